// Which channels of one token's input count, by each rule. Included by decode.h inside its namespace.

// Ratios as whole numbers of the same order, which is that of floats from +0 on: the highest is infinite or NaN.
constexpr uint32_t kInfinite = 0x7f800000;

inline uint32_t ratio_key(float size, float threshold) {
  const float ratio = size / threshold;
  uint32_t key;
  memcpy(&key, &ratio, 4);
  key &= 0x7fffffff;
  return key > kInfinite ? kInfinite : key;
}

inline float key_ratio(uint32_t key) {
  float ratio;
  memcpy(&ratio, &key, 4);
  return ratio;
}

// The size of the difference, and the difference as the product reads it.
inline float distance(const SparitySkip& skip, const uint16_t* x, int64_t column) {
  return fabsf(skip.centre ? to_float(x[column]) - to_float(skip.centre[column]) : to_float(x[column]));
}

inline uint16_t moved(const SparitySkip& skip, const uint16_t* x, int64_t column) {
  return skip.centre ? to_bfloat16(to_float(x[column]) - to_float(skip.centre[column])) : x[column];
}

// Writes what counts: `counts(column, size)` of each channel, in order.
template <class Counts>
inline void keep(const SparitySkip& skip, const uint16_t* x, int64_t columns, uint16_t* out, const Counts& counts) {
#pragma GCC ivdep
  for (int64_t column = 0; column < columns; ++column) {  // out may be x
    const float size = distance(skip, x, column);
    const uint16_t value = moved(skip, x, column);
    out[column] = uint16_t(counts(column, size) | (size != size) ? value : 0);
  }
}

// In independent sums, which the compiler makes into vectors.
template <class Term>
inline double sum_of(int64_t columns, const Term& term) {
  double sums[kLanes] = {}, sum = 0;
  int64_t column = 0;
  for (; column + kLanes <= columns; column += kLanes)
    for (int i = 0; i < kLanes; ++i) sums[i] += term(column + i);
  for (; column < columns; ++column) sum += term(column);
  for (double part : sums) sum += part;
  return sum;
}

// The key of the `kept`th largest, and in `equal` how many of those with that key are among them.
inline uint32_t select(const uint32_t* keys, int64_t columns, int64_t kept, int64_t& equal) {
  constexpr int kBits = 11;
  uint32_t found = 0, known = 0;  // the upper bits of the key, and which they are
  equal = kept;
  for (int shift = 31 - kBits;; shift = shift > kBits ? shift - kBits : 0) {
    int32_t counts[1 << kBits] = {};
    const uint32_t mask = ~known & ~((uint32_t(1) << shift) - 1) & 0x7fffffff;
    for (int64_t column = 0; column < columns; ++column) {
      if ((keys[column] & known) == found) ++counts[(keys[column] & mask) >> shift];
    }
    int64_t bin = (1 << kBits) - 1;
    for (; counts[bin] < equal; --bin) equal -= counts[bin];
    found |= uint32_t(bin) << shift;
    known |= mask;
    if (!shift) return found;
  }
}

inline void keep_top(const SparitySkip& skip, const uint16_t* x, int64_t columns, uint32_t* keys, uint16_t* out) {
  for (int64_t column = 0; column < columns; ++column)
    keys[column] = ratio_key(distance(skip, x, column), skip.thresholds[column]);
  int64_t equal = columns;
  const uint32_t last = skip.kept < columns ? select(keys, columns, skip.kept, equal) : 0;
  int64_t end = 0;  // behind the last of the equal ones
  for (; equal > 0 && end < columns; ++end) equal -= keys[end] == last;
  keep(skip, x, columns, out, [&](int64_t column, float) {
    return (keys[column] > last) | ((keys[column] == last) & (column < end));
  });
}

inline void keep_statistical(const SparitySkip& skip, const uint16_t* x, int64_t columns, uint32_t* keys,
                             uint16_t* out) {
  for (int64_t column = 0; column < columns; ++column)
    keys[column] = ratio_key(distance(skip, x, column), skip.thresholds[column]);
  const double mean = sum_of(columns, [&](int64_t column) { return double(key_ratio(keys[column])); }) / double(columns);
  const double squares = sum_of(columns, [&](int64_t column) {
    const double away = double(key_ratio(keys[column])) - mean;
    return away * away;
  });
  const float limit = float(mean + skip.deviations * sqrt(squares / double(columns)));
  keep(skip, x, columns, out, [&](int64_t column, float) { return key_ratio(keys[column]) > limit; });
}

inline void keep_rms(const SparitySkip& skip, const uint16_t* x, int64_t columns, uint16_t* out) {
  const double squares = sum_of(columns, [&](int64_t column) {
    const double value = double(to_float(x[column]));
    return value * value;
  });
  const float rms = float(sqrt(squares / double(columns)));
  keep(skip, x, columns, out, [&](int64_t column, float size) { return size > skip.thresholds[column] * rms; });
}

// One token; `keys` has room for its columns where the rule is top or statistical.
void skip(const SparitySkip& skip, const uint16_t* x, bool whole, int64_t columns, uint32_t* keys, uint16_t* out) {
  if (whole) {
    if (out != x) memcpy(out, x, size_t(columns) * sizeof(uint16_t));
    return;
  }
  switch (skip.scale) {
    case SPARITY_SKIP_RMS:
      return keep_rms(skip, x, columns, out);
    case SPARITY_SKIP_TOP:
      return keep_top(skip, x, columns, keys, out);
    case SPARITY_SKIP_STATISTICAL:
      return keep_statistical(skip, x, columns, keys, out);
    default:
      return keep(skip, x, columns, out, [&](int64_t column, float size) { return size > skip.thresholds[column]; });
  }
}
