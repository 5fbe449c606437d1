// What AVX-512 adds to a tile of weights by input channel. Included inside the namespace of its instruction sets.

struct Columns512 {
  static constexpr int kVector = 64;
  static constexpr int kFloatTokens = 4;

  // One channel after another, by products of float32.
  template <int Count, int Tokens>
  static inline void add_widened(const uint16_t* const* channels, int64_t row, const float (&x)[Count][Tokens],
                                 float* sums, int64_t width) {
    const __m512i upper = _mm512_set1_epi32(int(0xffff0000));
    __m512 even[Tokens], odd[Tokens];
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) {
      even[t] = _mm512_load_ps(sums + t * width);
      odd[t] = _mm512_load_ps(sums + t * width + 16);
    }
#pragma GCC unroll 8
    for (int i = 0; i < Count; ++i) {
      const __m512i weights = _mm512_loadu_si512(channels[i] + row);
      const __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(weights, 16));
      const __m512 second = _mm512_castsi512_ps(_mm512_and_si512(weights, upper));
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) {
        const __m512 input = _mm512_set1_ps(x[i][t]);
        even[t] = _mm512_fmadd_ps(first, input, even[t]);
        odd[t] = _mm512_fmadd_ps(second, input, odd[t]);
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) {
      _mm512_store_ps(sums + t * width, even[t]);
      _mm512_store_ps(sums + t * width + 16, odd[t]);
    }
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
#pragma GCC unroll 4
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
