// int4, dense or two of four: tiles of sixteen rows side by side, so that a vector holds some columns of every row, each
// row's sum has a lane of its own, and a group costs one scaling of sixteen rows. Scales and zero points of a group follow
// each other too: sixteen rows. `Isa::Rows` has the vectors:
//   Total  int32 sums of sixteen rows;    Sum  float32 sums of them
//   Zeros  their zero points;             PairZeros  the same, or eights, as two of four takes them
// A group's sum is a whole number, so a weight that is two of four has the bits of the same weight stored dense.
// Included by nibbles.h within its namespace.

constexpr int64_t kRowsAhead = 4096;  // bytes

// Of eight columns, four bytes of each row follow each other: the even columns in their lower halves.
template <class Isa, bool WithZeros>
struct DenseTile {
  using Rows = typename Isa::Rows;
  const uint8_t* codes;
  typename Rows::Zeros zeros = {};

  DenseTile(const SparityMatrix& weight, int64_t tile)
      : codes(static_cast<const uint8_t*>(weight.values) + tile * kSideBySide * (weight.columns / 2)) {}

  inline void begin_group(const SparityMatrix& weight, int64_t side) {
    if (WithZeros) zeros = Rows::zeros(weight.zeros + side);
  }
  inline typename Rows::Total start(int32_t shift) const { return Rows::template start<WithZeros>(zeros, shift); }

  // 32 columns; `x` has the even ones of every eight before the odd ones.
  template <int Tokens>
  inline void add(typename Rows::Total* totals, const int8_t* x, int64_t stride) {
    for (int line = 0; line < 4; ++line) __builtin_prefetch(codes + kRowsAhead + 64 * line);
    Rows::template add<WithZeros, Tokens>(totals, codes, zeros, x, stride);
    codes += 32 / 2 * kSideBySide;
  }
};

// Of sixteen columns, two bytes of each row follow each other in the masks: where in each four the first kept weight is, and
// where the second, two bits a four from the lowest on. Of eight columns, two bytes of each row follow each other in the
// values: the first kept code and the second, plus the zero point or 8; those of the first four in the lower halves.
template <class Isa, bool WithZeros>
struct PairedTile {
  using Rows = typename Isa::Rows;
  const uint8_t *places, *codes;
  typename Rows::PairZeros zeros;

  PairedTile(const SparityMatrix& weight, int64_t tile)
      : places(weight.masks + tile * kSideBySide * (weight.columns / 8)),
        codes(static_cast<const uint8_t*>(weight.values) + tile * kSideBySide * (weight.columns / 4)),
        zeros(Rows::pair_zeros(nullptr)) {}

  inline void begin_group(const SparityMatrix& weight, int64_t side) {
    if (WithZeros) zeros = Rows::pair_zeros(weight.zeros + side);
  }
  inline typename Rows::Total start(int32_t) const {
    typename Rows::Total none = {};
    return none;
  }

  // 32 columns, in their order in `x`.
  template <int Tokens>
  inline void add(typename Rows::Total* totals, const int8_t* x, int64_t stride) {
    __builtin_prefetch(places + kRowsAhead / 2);
    __builtin_prefetch(codes + kRowsAhead);
    __builtin_prefetch(codes + kRowsAhead + 64);
    Rows::template add_pairs<Tokens>(totals, places, codes, zeros, x, stride);
    places += 32 / 8 * kSideBySide;
    codes += 32 / 4 * kSideBySide;
  }
};

// The rows of one tile times `Tokens` inputs: results[token][row]. The order of a sum's terms does not depend on `Tokens`.
template <class Isa, int Tokens, class Source>
inline void rows_tile(const SparityMatrix& weight, const Inputs& in, int64_t token, int64_t tile,
                      float (*results)[kSideBySide]) {
  using Rows = typename Isa::Rows;
  const int64_t groups = weight.columns / weight.group, parts = weight.group / 32;
  Source source(weight, tile);
  const int8_t* x = static_cast<const int8_t*>(in.x) + token * in.stride;
  const float* theirs = in.scales + token * in.group_stride;
  const int32_t* shifts = in.shifts + token * in.shift_stride;
  typename Rows::Sum sums[Tokens] = {};
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t side = (tile * groups + group) * kSideBySide;
    source.begin_group(weight, side);
    typename Rows::Total totals[Tokens];
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) totals[t] = source.start(shifts[t * in.shift_stride + group]);
    for (int64_t part = 0; part < parts; ++part, x += 32) source.template add<Tokens>(totals, x, in.stride);
    const auto scales = Rows::scales(weight, side);
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t)
      sums[t] = Rows::finish(sums[t], totals[t], scales, theirs[t * in.group_stride + group]);
  }
  for (int t = 0; t < Tokens; ++t) Rows::store(sums[t], results[t]);
}

// write(token, results) for every input of a tile.
template <class Isa, template <class, bool> class Of, class Write>
inline void rows_all_tokens(const SparityMatrix& weight, const Inputs& in, int64_t tokens, int64_t tile,
                            const Write& write) {
  const auto multiply = [&](auto count, int64_t token) {
    float results[count][kSideBySide];
    if (weight.zeros)
      rows_tile<Isa, count, Of<Isa, true>>(weight, in, token, tile, results);
    else
      rows_tile<Isa, count, Of<Isa, false>>(weight, in, token, tile, results);
    for (int t = 0; t < count; ++t) write(token + t, results[t]);
  };
  in_batches(tokens, multiply);
}

template <class Isa, template <class, bool> class Of>
void rows_side_by_side(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t tokens, int64_t begin,
                       int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * kSideBySide;
    const int64_t count = weight.rows - first < kSideBySide ? weight.rows - first : kSideBySide;
    rows_all_tokens<Isa, Of>(weight, in, tokens, tile, [&](int64_t token, const float* results) {
      store_all(out, token * weight.rows + first, results, count);
    });
  }
}

// Some rows of a dense weight, rising, with the bits that they have among all: every tile that has one is multiplied.
template <class Isa>
void rows_listed(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t tokens, const int32_t* rows,
                 int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t tile = rows[begin] / kSideBySide;
    int64_t next = begin;
    while (next < end && rows[next] / kSideBySide == tile) ++next;
    rows_all_tokens<Isa, DenseTile>(weight, in, tokens, tile, [&](int64_t token, const float* results) {
      for (int64_t i = begin; i < next; ++i) store(out, token * weight.rows + rows[i], results[rows[i] % kSideBySide]);
    });
    begin = next;
  }
}

// 32 columns of a row, from `column` on, one code in a byte.
inline void dense_codes(const SparityMatrix& weight, int64_t row, int64_t column, uint8_t* out) {
  const int64_t first = row / kSideBySide * (weight.columns / 2) * kSideBySide + row % kSideBySide * 4;
  const auto* at = static_cast<const uint8_t*>(weight.values) + first + column / 8 * 4 * kSideBySide;
  for (int64_t i = 0; i < 32; i += 8, at += 4 * kSideBySide)
    for (int64_t j = 0; j < 4; ++j) {
      out[i + 2 * j] = at[j] & 15;
      out[i + 2 * j + 1] = at[j] >> 4;
    }
}

inline void paired_codes(const SparityMatrix& weight, int64_t row, int64_t column, uint8_t* out) {
  const int64_t within = row % kSideBySide * 2, tile = row / kSideBySide * kSideBySide;
  const auto* places = weight.masks + tile * (weight.columns / 8) + column / 8 * kSideBySide + within;
  const auto* codes = static_cast<const uint8_t*>(weight.values) + tile * (weight.columns / 4) +
                      column / 4 * kSideBySide + within;
  const int zero = weight.zeros ? weight.zeros[side_of(weight, row, column / weight.group)] : 8;
  memset(out, 0, 32);
  for (int64_t four = 0; four < 8; ++four)
    for (int64_t kept = 0; kept < 2; ++kept) {
      const int place = places[four / 4 * 2 * kSideBySide + kept] >> four % 4 * 2 & 3;
      const int whole = codes[four / 2 * 2 * kSideBySide + kept] >> four % 2 * 4 & 15;
      out[4 * four + place] = uint8_t((whole - zero) & 15);
    }
}
