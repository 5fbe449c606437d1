// What AVX-512 adds to a tile of weights by input channel. Included inside the namespace of its instruction sets.

struct Columns512 {
  static constexpr int kVector = 64;
  using Lanes = __m512;

  static inline Lanes spread(float x) { return _mm512_set1_ps(x); }

  template <int Count>
  static inline void add_floats(const uint16_t* const* channels, int64_t row, const Lanes* x, float* sums) {
    const __m512i upper = _mm512_set1_epi32(int(0xffff0000));
    __m512 even = _mm512_load_ps(sums), odd = _mm512_load_ps(sums + 16);
#pragma GCC unroll 8
    for (int i = 0; i < Count; ++i) {
      const __m512i weights = _mm512_loadu_si512(channels[i] + row);
      even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(weights, 16)), x[i], even);
      odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(weights, upper)), x[i], odd);
    }
    _mm512_store_ps(sums, even);
    _mm512_store_ps(sums + 16, odd);
  }

  // Four weights of each row beside each other, sixteen rows in a vector.
  static inline void interleave(const int8_t* const* channels, int64_t row, __m512i (&out)[4]) {
    const __m512i a = _mm512_loadu_si512(channels[0] + row), b = _mm512_loadu_si512(channels[1] + row);
    const __m512i c = _mm512_loadu_si512(channels[2] + row), d = _mm512_loadu_si512(channels[3] + row);
    const __m512i low_ab = _mm512_unpacklo_epi8(a, b), high_ab = _mm512_unpackhi_epi8(a, b);
    const __m512i low_cd = _mm512_unpacklo_epi8(c, d), high_cd = _mm512_unpackhi_epi8(c, d);
    out[0] = _mm512_unpacklo_epi16(low_ab, low_cd);
    out[1] = _mm512_unpackhi_epi16(low_ab, low_cd);
    out[2] = _mm512_unpacklo_epi16(high_ab, high_cd);
    out[3] = _mm512_unpackhi_epi16(high_ab, high_cd);
  }

  // `multiply(sum, weights, x)` adds products of four pairs of bytes.
  template <int Fours, int Tokens, class Multiply>
  static inline void add_bytes_by(const int8_t* const* channels, int64_t row, const int32_t (&x)[Fours][Tokens],
                                  int32_t* sums, int64_t width, const Multiply& multiply) {
    __m512i totals[Tokens][4];
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) totals[t][part] = _mm512_load_si512(sums + t * width + 16 * part);
#pragma GCC unroll 2
    for (int four = 0; four < Fours; ++four) {
      __m512i weights[4];
      interleave(channels + 4 * four, row, weights);
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) {
        const __m512i inputs = _mm512_set1_epi32(x[four][t]);
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part) totals[t][part] = multiply(totals[t][part], weights[part], inputs);
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) _mm512_store_si512(sums + t * width + 16 * part, totals[t][part]);
  }
};
