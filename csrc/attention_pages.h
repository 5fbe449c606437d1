// What pages of keys may be worth to the queries of a head, by bounds of their keys. Included by attention.h inside its
// namespace.

template <class I, class S>
inline void judge_pages(const SparityJudging& of, int64_t pair, int64_t begin, int64_t end, float* out) {
  alignas(64) float plain[kMostHeadWidth], signs[kMostHeadWidth];
  alignas(64) float first[4 * kMostHeadWidth], second[4 * kMostHeadWidth], found[2][4 * kStretch];
  const int64_t width = of.width, stride = S::bytes(width);
  const auto* low = static_cast<const uint8_t*>(of.low) + of.starts[pair] * stride;
  const auto* high = static_cast<const uint8_t*>(of.high) + of.starts[pair] * stride;
  for (int64_t query = 0; query < of.group; query += 4) {
    const int64_t packed = of.group - query < 4 ? of.group - query : 4;
    for (int64_t i = 0; i < packed; ++i) {
      numbers_at(of.queries, of.type, (pair * of.group + query + i) * width, width, plain);
      const float levels = of.levels;
      // of minima and maxima: those under negative and under positive numbers; of minima and steps: all, and positive ones
      for (int64_t at = 0; at < width; ++at) signs[at] = levels != 0 || plain[at] < 0 || !of.high ? plain[at] : 0.0f;
      spread<I, S::kPer>(signs, width, first + i * width);
      for (int64_t at = 0; at < width; ++at) signs[at] = plain[at] > 0 ? plain[at] * (levels != 0 ? levels : 1.0f) : 0.0f;
      spread<I, S::kPer>(signs, width, second + i * width);
    }
    for (int64_t page = begin; page < end; page += kStretch) {
      const int64_t now = end - page < kStretch ? end - page : kStretch;
      all_dots<I, S>(low + page * stride, now, first, packed, width, {}, found[0], kStretch);
      if (of.high) all_dots<I, S>(high + page * stride, now, second, packed, width, {}, found[1], kStretch);
      for (int64_t i = 0; i < packed; ++i)
        for (int64_t at = 0; at < now; ++at) {
          const float bound = found[0][i * kStretch + at] + (of.high ? found[1][i * kStretch + at] : 0.0f);
          float& best = out[page + at];
          const bool more = bound > best || bound != bound;
          if (query + i == 0) best = bound;
          else if (of.mean) best += bound;
          else best = more ? bound : best;
        }
    }
  }
  if (of.mean)
    for (int64_t page = begin; page < end; ++page) out[page] /= float(of.group);
}

template <class I>
void judge(const SparityJudging& of, int64_t pair, int64_t begin, int64_t end, float* out) {
  if (of.type == SPARITY_FLOAT32) return judge_pages<I, Floats32<I>>(of, pair, begin, end, out);
  judge_pages<I, Floats16<I>>(of, pair, begin, end, out);
}
