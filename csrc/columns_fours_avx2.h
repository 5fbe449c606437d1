// int4 by input channel with 256-bit vectors. Included inside the namespaces of instruction sets.

// A line is two halves of 32 bytes; in each, the channels' neighbours of eight bytes of a lane.
struct ColumnFours256 {
  static constexpr int kTokens = 2;

  // Which row of a line the zero point at `i` is of: by half, part of a lane, four bytes of it, and half byte.
  static constexpr int row_of(int i) {
    const int vector = i / 8, lane = i % 8 / 4;
    return 2 * (vector / 8 * 32 + lane * 16 + vector / 4 % 2 * 8 + vector / 2 % 2 * 4 + i % 4) + vector % 2;
  }
  static inline void order_zeros(const uint8_t* zeros, uint32_t* out) {
#pragma GCC unroll 128
    for (int i = 0; i < 128; ++i) out[i] = zeros[row_of(i)] * 0x01010101u;
  }

  template <bool Zeros>
  static inline __m256i ready(__m256i codes, const uint32_t* zeros) {
    const __m256i fifteen = _mm256_set1_epi8(15);
    if (!Zeros) return _mm256_and_si256(_mm256_xor_si256(codes, _mm256_set1_epi8(8)), fifteen);
    const __m256i own = _mm256_load_si256(reinterpret_cast<const __m256i*>(zeros));
    return _mm256_and_si256(_mm256_add_epi8(codes, own), fifteen);
  }
  static inline __m256i more(__m256i total, __m256i codes, __m256i x) {  // two products are at most 3810
    return _mm256_add_epi32(total, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1)));
  }

  template <int Tokens, bool Zeros>
  static inline void add(const uint8_t* const* channels, int fours, int64_t at, const int32_t* x, const uint32_t* zeros,
                         int32_t (*totals)[128]) {
    const auto load = [&](int channel, int half) __attribute__((always_inline)) {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(channels[channel] + at + 32 * half));
    };
    for (int half = 0; half < 2; ++half)
      for (int upper = 0; upper < 2; ++upper) {
        const uint32_t* own = Zeros ? zeros + (half * 8 + upper * 4) * 8 : nullptr;
        __m256i sums[Tokens][4] = {};
        for (int four = 0; four < fours; ++four) {
          const __m256i a = load(4 * four, half), b = load(4 * four + 1, half);
          const __m256i c = load(4 * four + 2, half), d = load(4 * four + 3, half);
          const __m256i ab = upper ? _mm256_unpackhi_epi8(a, b) : _mm256_unpacklo_epi8(a, b);
          const __m256i cd = upper ? _mm256_unpackhi_epi8(c, d) : _mm256_unpacklo_epi8(c, d);
          const __m256i bytes[2] = {_mm256_unpacklo_epi16(ab, cd), _mm256_unpackhi_epi16(ab, cd)};
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            const __m256i nibbles = i % 2 ? _mm256_srli_epi16(bytes[i / 2], 4) : bytes[i / 2];
            const __m256i codes = ready<Zeros>(nibbles, Zeros ? own + 8 * i : nullptr);
#pragma GCC unroll 2
            for (int t = 0; t < Tokens; ++t)
              sums[t][i] = more(sums[t][i], codes, _mm256_set1_epi32(x[four * Tokens + t]));
          }
        }
#pragma GCC unroll 2
        for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
          for (int q = 0; q < 2; ++q) {
            const __m256i first = _mm256_unpacklo_epi32(sums[t][2 * q], sums[t][2 * q + 1]);
            const __m256i second = _mm256_unpackhi_epi32(sums[t][2 * q], sums[t][2 * q + 1]);
            auto* to = reinterpret_cast<__m256i*>(totals[t] + 64 * half + 16 * upper + 8 * q);
            _mm256_store_si256(to, _mm256_permute2x128_si256(first, second, 0x20));
            _mm256_store_si256(to + 4, _mm256_permute2x128_si256(first, second, 0x31));
          }
      }
  }
};
