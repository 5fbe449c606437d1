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

  // Four weights of eight rows times four inputs: the weight's size times the input with its sign.
  template <int Tokens>
  static inline __m256i add_fours(__m256i sums, __m256i weights, __m256i inputs) {
    const __m256i sizes = _mm256_abs_epi8(weights), signed_inputs = _mm256_sign_epi8(inputs, weights);
    return Tokens == 1 ? add_bytes_apart(sums, sizes, signed_inputs) : ::add_bytes(sums, sizes, signed_inputs);
  }

  // Sums of a few tokens stay in registers; those of more have no room there.
  template <int Fours, int Tokens>
  static inline void add_bytes(const int8_t* const* channels, int64_t row, const int32_t (&x)[Fours][Tokens],
                               int32_t* sums, int64_t width) {
    constexpr bool kept = Tokens <= 2;
    for (int half = 0; half < 2; ++half) {
      auto* at = reinterpret_cast<__m256i*>(sums + 32 * half);
      __m256i totals[Tokens][4];
      const auto load = [&](int t) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part) totals[t][part] = _mm256_load_si256(at + t * (width / 8) + part);
      };
      const auto store = [&](int t) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part) _mm256_store_si256(at + t * (width / 8) + part, totals[t][part]);
      };
#pragma GCC unroll 2
      for (int t = 0; kept && t < Tokens; ++t) load(t);
#pragma GCC unroll 4
      for (int four = 0; four < Fours; ++four) {
        __m256i weights[4];
        interleave(channels + 4 * four, row + 32 * half, weights);
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) {
          const __m256i inputs = _mm256_set1_epi32(x[four][t]);
          if (!kept) load(t);
#pragma GCC unroll 4
          for (int part = 0; part < 4; ++part) totals[t][part] = add_fours<Tokens>(totals[t][part], weights[part], inputs);
          if (!kept) store(t);
        }
      }
#pragma GCC unroll 2
      for (int t = 0; kept && t < Tokens; ++t) store(t);
    }
  }
};
