// What AVX2 adds to a tile of weights by input channel. Included inside the namespace of its instruction set.

struct Columns256 {
  static constexpr int kVector = 32;
  static constexpr int kTogether = 1, kFloatTokens = 4;
  using Multiplier = float;

  static inline float multiplier(float x, float) { return x; }
  static constexpr int64_t float_place(int64_t row) { return row / 16 * 16 + row % 2 * 8 + row % 16 / 2; }

  template <int Count, int Tokens>
  static inline void add_floats(const uint16_t* const* channels, int64_t row, const float (&x)[Count][Tokens],
                                float* sums, int64_t width) {
    const __m256i upper = _mm256_set1_epi32(int(0xffff0000));
    for (int half = 0; half < 2; ++half, sums += 16) {
      __m256 even[Tokens], odd[Tokens];
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) {
        even[t] = _mm256_load_ps(sums + t * width);
        odd[t] = _mm256_load_ps(sums + t * width + 8);
      }
#pragma GCC unroll 8
      for (int i = 0; i < Count; ++i) {
        const __m256i weights = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(channels[i] + row + 16 * half));
        const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(weights, 16));
        const __m256 second = _mm256_castsi256_ps(_mm256_and_si256(weights, upper));
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) {
          const __m256 input = _mm256_broadcast_ss(&x[i][t]);
          even[t] = _mm256_fmadd_ps(first, input, even[t]);
          odd[t] = _mm256_fmadd_ps(second, input, odd[t]);
        }
      }
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) {
        _mm256_store_ps(sums + t * width, even[t]);
        _mm256_store_ps(sums + t * width + 8, odd[t]);
      }
    }
  }

  // Four weights of each row beside each other, eight rows in a vector.
  static inline void interleave(const int8_t* const* channels, int64_t row, __m256i (&out)[4]) {
    __m256i four[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) four[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(channels[i] + row));
    const __m256i low_ab = _mm256_unpacklo_epi8(four[0], four[1]), high_ab = _mm256_unpackhi_epi8(four[0], four[1]);
    const __m256i low_cd = _mm256_unpacklo_epi8(four[2], four[3]), high_cd = _mm256_unpackhi_epi8(four[2], four[3]);
    out[0] = _mm256_unpacklo_epi16(low_ab, low_cd);
    out[1] = _mm256_unpackhi_epi16(low_ab, low_cd);
    out[2] = _mm256_unpacklo_epi16(high_ab, high_cd);
    out[3] = _mm256_unpackhi_epi16(high_ab, high_cd);
  }

  template <int Fours, int Tokens>
  static inline void add_bytes(const int8_t* const* channels, int64_t row, const int32_t (&x)[Fours][Tokens],
                               int32_t* sums, int64_t width) {
    for (int half = 0; half < 2; ++half) {
      auto* at = reinterpret_cast<__m256i*>(sums + 32 * half);
      for (int four = 0; four < Fours; ++four) {
        __m256i weights[4];
        interleave(channels + 4 * four, row + 32 * half, weights);
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) {
          const __m256i inputs = _mm256_set1_epi32(x[four][t]);
#pragma GCC unroll 4
          for (int part = 0; part < 4; ++part) {  // the weight's size times the input with its sign: fits int16
            const __m256i pairs =
                _mm256_maddubs_epi16(_mm256_abs_epi8(weights[part]), _mm256_sign_epi8(inputs, weights[part]));
            const __m256i sum = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
            __m256i* to = at + t * (width / 8) + part;
            _mm256_store_si256(to, _mm256_add_epi32(_mm256_load_si256(to), sum));
          }
        }
      }
    }
  }
};
