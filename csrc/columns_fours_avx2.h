// int4 by input channel with 256-bit vectors. Included inside the namespaces of instruction sets.

// A line is two halves of 32 bytes. Two channels' bytes become neighbours, and one multiplication adds both of a row: four
// vectors of int16 sums for the 64 rows of a half, of which the first two have the lower eight bytes of each lane, in
// their lower and upper half bytes.
struct ColumnFours256 {
  static constexpr int kTokens = 2;
  static constexpr int kFours = 4;  // whose sums fit int16: eight times two products of at most 15 times 127

  // The zero point of each row in two bytes, in the order of the sums.
  static inline void order_zeros(const uint8_t* zeros, uint32_t* out) {
    auto* to = reinterpret_cast<__m256i*>(out);
    for (int i = 0; i < 4; ++i) {
      const uint8_t* from = zeros + 64 * (i / 2) + 16 * (i % 2);
      const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 32));
      const __m256i both = _mm256_set_m128i(high, low);
      const __m256i even = _mm256_and_si256(both, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(both, 8);
      _mm256_store_si256(to + 2 * i, _mm256_or_si256(even, _mm256_slli_epi16(even, 8)));
      _mm256_store_si256(to + 2 * i + 1, _mm256_or_si256(odd, _mm256_slli_epi16(odd, 8)));
    }
  }

  template <int Tokens, bool Zeros, class Ahead>
  static inline void add(const uint8_t* const* channels, int fours, int64_t at, const int32_t* x, const uint32_t* zeros,
                         int32_t (*totals)[128], Ahead& ahead) {
    for (int half = 0; half < 2; ++half) {
      int64_t four = 0;
      do {
        const int64_t end = four + kFours < fours ? four + kFours : fours;
        add_fours<Tokens, Zeros>(channels, four, end, at + 32 * half, x, zeros + 32 * half, 64 * half, totals,
                                 ahead);
        four = end;
      } while (four < fours);
    }
  }

 private:
  // Without zero points, `neighbours` are code + 8 in each half byte.
  template <bool Zeros>
  static inline __m256i whole(__m256i neighbours, bool upper, const uint32_t* zeros) {
    __m256i codes = upper ? _mm256_srli_epi16(neighbours, 4) : neighbours;
    if (Zeros) codes = _mm256_add_epi8(codes, _mm256_load_si256(reinterpret_cast<const __m256i*>(zeros)));
    return _mm256_and_si256(codes, _mm256_set1_epi8(15));
  }

  template <int Tokens, bool Zeros, class Ahead>
  static inline void add_fours(const uint8_t* const* channels, int64_t begin, int64_t end, int64_t at, const int32_t* x,
                               const uint32_t* zeros, int row, int32_t (*totals)[128], Ahead& ahead) {
    const auto load = [&](int64_t channel) __attribute__((always_inline)) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(channels[channel] + at));
      return Zeros ? bytes : _mm256_xor_si256(bytes, _mm256_set1_epi8(char(0x88)));
    };
    __m256i sums[Tokens][4] = {};
    for (int64_t four = begin; four < end; ++four) {
      ahead.template step<2>();
#pragma GCC unroll 2
      for (int two = 0; two < 2; ++two) {
        const __m256i a = load(4 * four + 2 * two), b = load(4 * four + 2 * two + 1);
        const __m256i neighbours[2] = {_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)};
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const __m256i codes = whole<Zeros>(neighbours[i / 2], i % 2, zeros + (Zeros ? 8 * i : 0));
#pragma GCC unroll 2
          for (int t = 0; t < Tokens; ++t) {
            int16_t inputs;
            memcpy(&inputs, reinterpret_cast<const char*>(x + four * Tokens + t) + 2 * two, 2);
            const __m256i products = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(inputs));
            sums[t][i] = _mm256_add_epi16(sums[t][i], products);
          }
        }
      }
    }
#pragma GCC unroll 2
    for (int t = 0; t < Tokens; ++t) put(sums[t], begin, totals[t] + row);
  }

  // To the totals of 64 rows: eight of a lane come from even ones and odd ones.
  static inline void put(const __m256i (&sums)[4], bool more, int32_t* totals) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m256i even = sums[i / 2 * 2], odd = sums[i / 2 * 2 + 1];
      const __m256i rows = i % 2 ? _mm256_unpackhi_epi16(even, odd) : _mm256_unpacklo_epi16(even, odd);
      auto* low = reinterpret_cast<__m256i*>(totals + 8 * i);
      __m256i first = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(rows));
      __m256i second = _mm256_cvtepi16_epi32(_mm256_extracti128_si256(rows, 1));
      if (more) {
        first = _mm256_add_epi32(first, _mm256_load_si256(low));
        second = _mm256_add_epi32(second, _mm256_load_si256(low + 4));
      }
      _mm256_store_si256(low, first);
      _mm256_store_si256(low + 4, second);
    }
  }
};
