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

  // Both parts of lanes at once, or where that takes too many registers one after the other.
  template <int Tokens, bool Zeros>
  static inline void add(const uint8_t* const* channels, int fours, int64_t at, const int32_t* x, const uint32_t* zeros,
                         int32_t (*totals)[128]) {
    constexpr int kParts = Tokens > 1 ? 1 : 2;
    for (int half = 0; half < 2; ++half)
#pragma GCC unroll 2
      for (int part = 0; part < 2; part += kParts)
        add_parts<kParts, Tokens, Zeros>(channels, fours, at + 32 * half, x, zeros + (half * 8 + part * 4) * 8, part,
                                         64 * half, totals);
  }

  template <int Parts, int Tokens, bool Zeros>
  static inline void add_parts(const uint8_t* const* channels, int fours, int64_t at, const int32_t* x,
                               const uint32_t* zeros, int first, int row, int32_t (*totals)[128]) {
    const auto load = [&](int channel) __attribute__((always_inline)) {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(channels[channel] + at));
    };
    __m256i sums[Parts][Tokens][4] = {};
    for (int four = 0; four < fours; ++four) {
      const __m256i a = load(4 * four), b = load(4 * four + 1), c = load(4 * four + 2), d = load(4 * four + 3);
#pragma GCC unroll 2
      for (int part = 0; part < Parts; ++part) {
        const bool upper = first + part;
        const __m256i ab = upper ? _mm256_unpackhi_epi8(a, b) : _mm256_unpacklo_epi8(a, b);
        const __m256i cd = upper ? _mm256_unpackhi_epi8(c, d) : _mm256_unpacklo_epi8(c, d);
        const __m256i bytes[2] = {_mm256_unpacklo_epi16(ab, cd), _mm256_unpackhi_epi16(ab, cd)};
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const __m256i nibbles = i % 2 ? _mm256_srli_epi16(bytes[i / 2], 4) : bytes[i / 2];
          const __m256i codes = ready<Zeros>(nibbles, zeros + (Zeros ? 8 * (4 * part + i) : 0));
#pragma GCC unroll 2
          for (int t = 0; t < Tokens; ++t)
            sums[part][t][i] = more(sums[part][t][i], codes, _mm256_set1_epi32(x[four * Tokens + t]));
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < 2 * Parts * Tokens; ++i) {
      const int q = i % 2, t = i / 2 % Tokens, part = i / 2 / Tokens;
      const __m256i low = sums[part][t][2 * q], high = sums[part][t][2 * q + 1];
      const __m256i even = _mm256_unpacklo_epi32(low, high), odd = _mm256_unpackhi_epi32(low, high);
      auto* to = reinterpret_cast<__m256i*>(totals[t] + row + 16 * (first + part) + 8 * q);
      _mm256_store_si256(to, _mm256_permute2x128_si256(even, odd, 0x20));
      _mm256_store_si256(to + 4, _mm256_permute2x128_si256(even, odd, 0x31));
    }
  }
};
