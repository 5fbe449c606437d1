// Tiles of bitmask and two_of_four times inputs: the weights of a row are spread by one shuffle, eight float32 or sixteen
// int16 at a time, straight to where the multiplication wants them. Included by isa_256.h inside its namespace.

// Where the rows of a group begin.
template <class Value>
using Starts = const Value* [kTileRows];

inline void fetch_ahead(const uint8_t* masks, const void* values, int element) {  // half of a group's, in whole lines
  __builtin_prefetch(masks + kAhead / 4);
  for (int line = 0; line < 2 * element; ++line)
    __builtin_prefetch(static_cast<const char*>(values) + kAhead / 2 * element + 64 * line);
}

inline __m128i load_sixteen(const void* at) { return _mm_loadu_si128(static_cast<const __m128i*>(at)); }
inline __m128i load_eight(const void* at) { return _mm_loadl_epi64(static_cast<const __m128i*>(at)); }

// The values of a bitmask, one after another.
template <class Value>
struct MaskedRows {
  static constexpr int kVector = 16;  // values that may be read at once
  const uint8_t* masks;
  const Value *values, *end;
  Value copies[kTileRows * kGroup + 2 * kVector];
  Value* copy = copies;

  MaskedRows(const SparityMatrix& weight, int64_t tile)
      : masks(weight.masks + tile * ((weight.columns + kGroup - 1) / kGroup) * kTileRows * 8),
        values(static_cast<const Value*>(weight.values) + weight.offsets[tile]),
        end(static_cast<const Value*>(weight.values) + weight.kept) {}

  // The next group's rows. Vectors may be read at each of its values.
  inline void next(Starts<Value>& rows) {
    const Value* at = values;
#pragma GCC unroll 4
    for (int row = 0; row < kTileRows; ++row) {
      rows[row] = at;
      at += __builtin_popcountll(load_word(masks + 8 * row));
    }
    if (__builtin_expect(end - at < kVector, 0)) {  // they would reach beyond the last value
      memcpy(copy, values, size_t(at - values) * sizeof(Value));
      for (int row = 0; row < kTileRows; ++row) rows[row] = copy + (rows[row] - values);
      copy += at - values;  // fewer than kVector values are left, so there is room for all that follow
    }
    masks += kTileRows * 8;
    values = at;
  }

  // Behind the values of the eight that has this entry.
  static inline const Value* behind(const Value* at, uint64_t entry) { return at + __builtin_popcountll(entry); }
  // Behind the values of the first `Columns` weights of a row.
  template <int Columns>
  static inline const Value* behind_first(const Value* row, uint64_t mask) {
    return row + __builtin_popcountll(mask & ((uint64_t(1) << Columns) - 1));
  }
  static inline __m256i load(const Value* at) { return _mm256_broadcastsi128_si256(load_sixteen(at)); }
};

// Two values of every four.
template <class Value>
struct PairedRows {
  const uint8_t* masks;
  const Value* values;

  PairedRows(const SparityMatrix& weight, int64_t tile) {
    const int64_t groups = (weight.columns + kGroup - 1) / kGroup;
    masks = weight.masks + tile * groups * kTileRows * 8;
    values = static_cast<const Value*>(weight.values) + tile * groups * kTileRows * (kGroup / 2);
  }

  inline void next(Starts<Value>& rows) {
#pragma GCC unroll 4
    for (int row = 0; row < kTileRows; ++row) rows[row] = values + row * (kGroup / 2);
    masks += kTileRows * 8;
    values += kTileRows * (kGroup / 2);
  }

  static inline const Value* behind(const Value* at, uint64_t) { return at + 4; }
  template <int Columns>
  static inline const Value* behind_first(const Value* row, uint64_t) {
    return row + Columns / 2;
  }
  static inline __m256i load(const Value* at) { return _mm256_broadcastq_epi64(load_eight(at)); }
};

// The compiler may not look through this: left alone, it loads an input once for each row, and adds products in an order
// that needs more registers than there are.
template <class Vector>
inline void pin(Vector& value) {
  asm("" : "+x"(value));
}

// Eight number `Eight` of `Rows` rows times the inputs.
template <int Eight, int Rows, int Tokens, class Source>
inline void multiply_eight(const uint64_t* masks, const uint16_t** at, const float* const (&x)[Tokens],
                           __m256 (*sums)[Tokens]) {
  __m256 weights[Rows];
#pragma GCC unroll 2
  for (int row = 0; row < Rows; ++row) {
    const uint64_t entry = entry_of<Eight>(masks[row]);
    const __m256i places = load_entry(kFloatPlaces.of, entry);
    weights[row] = _mm256_castsi256_ps(_mm256_shuffle_epi8(Source::load(at[row]), places));
    at[row] = Source::behind(at[row], entry);
  }
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
    __m256 inputs = _mm256_loadu_ps(x[t] + 8 * Eight);
    if (Rows > 1) pin(inputs);
#pragma GCC unroll 2
    for (int row = 0; row < Rows; ++row) sums[row][t] = _mm256_fmadd_ps(weights[row], inputs, sums[row][t]);
  }
}

struct FloatProducts {
  using Value = uint16_t;
  using X = float;
  using Sum = __m256;

  template <int Rows, int Tokens, class Source>
  static inline void multiply(const uint64_t* masks, const uint16_t** at, const float* const (&x)[Tokens],
                              __m256 (*sums)[Tokens]) {
    multiply_eight<0, Rows, Tokens, Source>(masks, at, x, sums);
    multiply_eight<1, Rows, Tokens, Source>(masks, at, x, sums);
    multiply_eight<2, Rows, Tokens, Source>(masks, at, x, sums);
    multiply_eight<3, Rows, Tokens, Source>(masks, at, x, sums);
    multiply_eight<4, Rows, Tokens, Source>(masks, at, x, sums);
    multiply_eight<5, Rows, Tokens, Source>(masks, at, x, sums);
    multiply_eight<6, Rows, Tokens, Source>(masks, at, x, sums);
    multiply_eight<7, Rows, Tokens, Source>(masks, at, x, sums);
  }
};

// Sixteen number `Sixteen` of `Rows` rows times the inputs; sums are 256 times too large.
template <int Sixteen, int Rows, int Tokens, class Source>
inline void multiply_sixteen(const uint64_t* masks, const int8_t** at, const int16_t* const (&x)[Tokens],
                             __m256i (*sums)[Tokens]) {
  __m256i weights[Rows];
#pragma GCC unroll 2
  for (int row = 0; row < Rows; ++row) {
    const __m256i places = _mm256_add_epi8(load_entry(kFirstBytes.of, entry_of<2 * Sixteen>(masks[row])),
                                           load_entry(kSecondBytes.of, entry_of<2 * Sixteen + 1>(masks[row])));
    const int8_t* from = Source::template behind_first<16 * Sixteen>(at[row], masks[row]);
    weights[row] = _mm256_shuffle_epi8(Source::load(from), places);
  }
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
    __m256i inputs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x[t] + 16 * Sixteen));
    if (Rows > 1) pin(inputs);
#pragma GCC unroll 2
    for (int row = 0; row < Rows; ++row) {
      sums[row][t] = add_words(sums[row][t], weights[row], inputs);
      pin(sums[row][t]);
    }
  }
}

struct ByteProducts {
  using Value = int8_t;
  using X = int16_t;
  using Sum = __m256i;

  template <int Rows, int Tokens, class Source>
  static inline void multiply(const uint64_t* masks, const int8_t** at, const int16_t* const (&x)[Tokens],
                              __m256i (*sums)[Tokens]) {
    multiply_sixteen<0, Rows, Tokens, Source>(masks, at, x, sums);
    multiply_sixteen<1, Rows, Tokens, Source>(masks, at, x, sums);
    multiply_sixteen<2, Rows, Tokens, Source>(masks, at, x, sums);
    multiply_sixteen<3, Rows, Tokens, Source>(masks, at, x, sums);
  }
};

constexpr int64_t kBlock = 8;  // groups whose inputs stay in the first cache for all rows of a tile

// `Rows` rows of `count` groups, from `row` on: their sums are in registers.
template <int Rows, int Tokens, class Products, class Source>
inline void multiply_rows(const uint8_t* masks, Starts<typename Products::Value>* starts, int64_t count, int row,
                          const typename Products::X* x, int64_t stride, typename Products::Sum (*sums)[Tokens]) {
  typename Products::Sum now[Rows][Tokens];
  const typename Products::X* inputs[Tokens];
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
    inputs[t] = x + t * stride;
#pragma GCC unroll 2
    for (int i = 0; i < Rows; ++i) now[i][t] = sums[i][t];
  }
  for (int64_t group = 0; group < count; ++group, masks += kTileRows * 8) {
    uint64_t words[Rows];
#pragma GCC unroll 2
    for (int i = 0; i < Rows; ++i) words[i] = load_word(masks + 8 * (row + i));
    Products::template multiply<Rows, Tokens, Source>(words, starts[group] + row, inputs, now);
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) inputs[t] += kGroup;
  }
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
    for (int i = 0; i < Rows; ++i) sums[i][t] = now[i][t];
}

// A tile's next `count` groups, at most kBlock.
template <int Tokens, class Products, class Source>
inline void multiply_groups(Source& source, int64_t count, const typename Products::X* x, int64_t stride,
                            typename Products::Sum (*sums)[Tokens]) {
  using Value = typename Products::Value;
  if constexpr (Tokens == 1) {  // all rows' sums stay in registers
    for (int64_t group = 0; group < count; ++group) {
      fetch_ahead(source.masks, source.values, sizeof(Value));
      const uint8_t* masks = source.masks;
      Starts<Value> starts;
      source.next(starts);
#pragma GCC unroll 4
      for (int row = 0; row < kTileRows; ++row)
        multiply_rows<1, 1, Products, Source>(masks, &starts, 1, row, x + group * kGroup, stride, sums + row);
    }
  } else {  // those of two rows, which share the loaded inputs
    const uint8_t* masks = source.masks;
    Starts<Value> starts[kBlock];
    for (int64_t group = 0; group < count; ++group) {
      fetch_ahead(source.masks, source.values, sizeof(Value));
      source.next(starts[group]);
    }
#pragma GCC unroll 1
    for (int row = 0; row < kTileRows; row += 2)
      multiply_rows<2, Tokens, Products, Source>(masks, starts, count, row, x, stride, sums + row);
  }
}

template <int Tokens, class Source>
inline void spread_tile_floats(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t token,
                               int64_t tile) {
  const int64_t groups = (weight.columns + kGroup - 1) / kGroup;
  const float* x = static_cast<const float*>(in.x) + token * in.stride;
  Source source(weight, tile);
  __m256 sums[kTileRows][Tokens] = {};
  for (int64_t group = 0; group < groups; group += kBlock)
    multiply_groups<Tokens, FloatProducts>(source, groups - group < kBlock ? groups - group : kBlock,
                                           x + group * kGroup, in.stride, sums);
  float results[kTileRows][Tokens];
#pragma GCC unroll 4
  for (int row = 0; row < kTileRows; ++row)
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) results[row][t] = Isa256::sum({sums[row][t]});
  for (int row = 0; row < kTileRows; ++row)
    for (int t = 0; t < Tokens; ++t) store_inside(weight, out, token + t, tile * kTileRows + row, results[row][t]);
}

template <int Tokens, class Source>
inline void spread_tile_bytes(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t token,
                              int64_t tile) {
  constexpr int64_t kSafe = 64;  // groups: 4 * 64 pairs of products, each pair at most 2 * 127 * 127 * 256, fit int32
  const int64_t groups = (weight.columns + kGroup - 1) / kGroup;
  const int16_t* x = static_cast<const int16_t*>(in.x) + token * in.stride;
  Source source(weight, tile);
  __m256i totals[kTileRows][Tokens] = {};
  for (int64_t begin = 0; begin < groups; begin += kSafe) {
    const int64_t end = begin + kSafe < groups ? begin + kSafe : groups;
    __m256i sums[kTileRows][Tokens] = {};
    for (int64_t group = begin; group < end; group += kBlock)
      multiply_groups<Tokens, ByteProducts>(source, end - group < kBlock ? end - group : kBlock, x + group * kGroup,
                                            in.stride, sums);
#pragma GCC unroll 4
    for (int row = 0; row < kTileRows; ++row)
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t)
        totals[row][t] = _mm256_add_epi32(totals[row][t], _mm256_srai_epi32(sums[row][t], 8));
  }
  int64_t results[kTileRows][Tokens];
#pragma GCC unroll 4
  for (int row = 0; row < kTileRows; ++row)
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) results[row][t] = Isa256::total({totals[row][t]});
  for (int row = 0; row < kTileRows && tile * kTileRows + row < weight.rows; ++row)
    for (int t = 0; t < Tokens; ++t)
      store_scaled<Isa256>(weight, in, out, token + t, tile * kTileRows + row, results[row][t]);
}

template <int Tokens, template <class> class Rows>
inline void spread_tile(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t token,
                        int64_t tile) {
  if (weight.scales)
    spread_tile_bytes<Tokens, Rows<int8_t>>(weight, in, out, token, tile);
  else
    spread_tile_floats<Tokens, Rows<uint16_t>>(weight, in, out, token, tile);
}

template <template <class> class Rows>
inline void spread_tiles(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t tokens,
                         int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    int64_t token = 0;
    for (; token + 4 <= tokens; token += 4) spread_tile<4, Rows>(weight, in, out, token, tile);
    if (tokens - token == 3) spread_tile<3, Rows>(weight, in, out, token, tile);
    if (tokens - token == 2) spread_tile<2, Rows>(weight, in, out, token, tile);
    if (tokens - token == 1) spread_tile<1, Rows>(weight, in, out, token, tile);
  }
}
