// Dense int4: tiles of sixteen rows side by side, so that a vector holds four columns of every row, each row's sum has a
// lane of its own, and a group costs one scaling of sixteen rows. Of eight columns, four bytes of each row follow each
// other: the even columns in their lower halves. Scales and zero points of a group follow each other too: sixteen rows.
// `Isa::Rows` has the vectors:
//   Total  int32 sums of sixteen rows;    Sum  float32 sums of them;    Zeros  their zero points
// Included by nibbles.h within its namespace.

constexpr int64_t kRowsAhead = 4096;  // bytes

// The rows of one tile times `Tokens` inputs: results[token][row]. The order of a sum's terms does not depend on `Tokens`.
template <class Isa, int Tokens, bool Zeros>
inline void rows_tile(const SparityMatrix& weight, const Inputs& in, int64_t token, int64_t tile,
                      float (*results)[kSideBySide]) {
  using Rows = typename Isa::Rows;
  const int64_t groups = weight.columns / weight.group, parts = weight.group / 32;
  const auto* codes = static_cast<const uint8_t*>(weight.values) + tile * kSideBySide * (weight.columns / 2);
  const int8_t* x = static_cast<const int8_t*>(in.x) + token * in.stride;
  const float* theirs = in.scales + token * in.group_stride;
  const int32_t* shifts = in.shifts + token * in.shift_stride;
  typename Rows::Sum sums[Tokens] = {};
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t side = (tile * groups + group) * kSideBySide;
    typename Rows::Zeros zeros = {};
    if (Zeros) zeros = Rows::zeros(weight.zeros + side);
    typename Rows::Total totals[Tokens];
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) totals[t] = Rows::template start<Zeros>(zeros, shifts[t * in.shift_stride + group]);
    for (int64_t part = 0; part < parts; ++part) {
      for (int line = 0; line < 4; ++line) __builtin_prefetch(codes + kRowsAhead + 64 * line);
      Rows::template add<Zeros, Tokens>(totals, codes, zeros, x, in.stride);
      codes += 32 / 2 * kSideBySide;
      x += 32;
    }
    const auto scales = Rows::scales(weight, side);
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t)
      sums[t] = Rows::finish(sums[t], totals[t], scales, theirs[t * in.group_stride + group]);
  }
  for (int t = 0; t < Tokens; ++t) Rows::store(sums[t], results[t]);
}

// write(token, results) for every input of a tile.
template <class Isa, class Write>
inline void rows_all_tokens(const SparityMatrix& weight, const Inputs& in, int64_t tokens, int64_t tile,
                            const Write& write) {
  const auto multiply = [&](auto count, int64_t token) {
    float results[count][kSideBySide];
    if (weight.zeros)
      rows_tile<Isa, count, true>(weight, in, token, tile, results);
    else
      rows_tile<Isa, count, false>(weight, in, token, tile, results);
    for (int t = 0; t < count; ++t) write(token + t, results[t]);
  };
  in_batches(tokens, multiply);
}

template <class Isa>
void rows_side_by_side(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t tokens, int64_t begin,
                       int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * kSideBySide;
    const int64_t count = weight.rows - first < kSideBySide ? weight.rows - first : kSideBySide;
    rows_all_tokens<Isa>(weight, in, tokens, tile, [&](int64_t token, const float* results) {
      store_all(out, token * weight.rows + first, results, count);
    });
  }
}

// Some rows, rising, with the bits that they have among all: every tile that has one is multiplied.
template <class Isa>
void rows_listed(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t tokens, const int32_t* rows,
                 int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t tile = rows[begin] / kSideBySide;
    int64_t next = begin;
    while (next < end && rows[next] / kSideBySide == tile) ++next;
    rows_all_tokens<Isa>(weight, in, tokens, tile, [&](int64_t token, const float* results) {
      for (int64_t i = begin; i < next; ++i) store(out, token * weight.rows + rows[i], results[rows[i] % kSideBySide]);
    });
    begin = next;
  }
}

// 32 columns of a row, from `column` on, one code in a byte.
inline void row_codes(const SparityMatrix& weight, int64_t row, int64_t column, uint8_t* out) {
  const int64_t first = row / kSideBySide * (weight.columns / 2) * kSideBySide + row % kSideBySide * 4;
  const auto* at = static_cast<const uint8_t*>(weight.values) + first + column / 8 * 4 * kSideBySide;
  for (int64_t i = 0; i < 32; i += 8, at += 4 * kSideBySide)
    for (int64_t j = 0; j < 4; ++j) {
      out[i + 2 * j] = at[j] & 15;
      out[i + 2 * j + 1] = at[j] >> 4;
    }
}
