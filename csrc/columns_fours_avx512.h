// int4 by input channel with AVX-512 VNNI and VBMI. Included by isa_avx512_bf16.cpp inside its namespace.

// For each byte of a vector of codes the row of its line that it is of, without the vector's own offset.
struct CodeRows {
  alignas(64) uint8_t of[64];
  constexpr CodeRows() : of() {
    for (int i = 0; i < 64; ++i) of[i] = uint8_t(2 * (i / 16 * 16 + i % 16 / 4));
  }
};
constexpr CodeRows kCodeRows;

struct ColumnFours512 {
  static constexpr int kTokens = 4;

  static inline void order_zeros(const uint8_t* zeros, uint32_t* out) {
    const __m512i low = _mm512_loadu_si512(zeros), high = _mm512_loadu_si512(zeros + 64);
    const __m512i rows = _mm512_load_si512(kCodeRows.of);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {  // by part of a lane, four bytes of it, and half byte
      const __m512i own = _mm512_add_epi8(rows, _mm512_set1_epi8(char(i / 4 * 16 + i / 2 % 2 * 8 + i % 2)));
      _mm512_store_si512(out + 16 * i, _mm512_permutex2var_epi8(low, own, high));
    }
  }

  template <bool Zeros>
  static inline __m512i ready(__m512i codes, __m512i zeros) {
    if (!Zeros) return _mm512_ternarylogic_epi32(codes, _mm512_set1_epi8(8), _mm512_set1_epi8(15), 0x28);
    return _mm512_and_si512(_mm512_add_epi8(codes, zeros), _mm512_set1_epi8(15));
  }

  // All parts of lanes at once, or where that takes too many registers one after the other.
  template <int Tokens, bool Zeros, class Ahead>
  static inline void add(const uint8_t* const* channels, int fours, int64_t at, const int32_t* x, const uint32_t* zeros,
                         int32_t (*totals)[128], Ahead& ahead) {
    constexpr int kParts = Tokens > 2 ? 1 : 2;
#pragma GCC unroll 2
    for (int part = 0; part < 2; part += kParts)
      add_parts<kParts, Tokens, Zeros>(channels, fours, at, x, zeros, part, totals, ahead);
  }

  template <int Parts, int Tokens, bool Zeros, class Ahead>
  static inline void add_parts(const uint8_t* const* channels, int fours, int64_t at, const int32_t* x,
                               const uint32_t* zeros, int first, int32_t (*totals)[128], Ahead& ahead) {
    __m512i sums[Parts][Tokens][4], own[Parts][4];
#pragma GCC unroll 8
    for (int i = 0; i < 4 * Parts; ++i) {
      own[i / 4][i % 4] = Zeros ? _mm512_load_si512(zeros + 16 * (4 * first + i)) : _mm512_setzero_si512();
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) sums[i / 4][t][i % 4] = _mm512_setzero_si512();
    }
    for (int four = 0; four < fours; ++four) {
      ahead.template step<2 / Parts>();
      const __m512i a = _mm512_loadu_si512(channels[4 * four] + at), b = _mm512_loadu_si512(channels[4 * four + 1] + at);
      const __m512i c = _mm512_loadu_si512(channels[4 * four + 2] + at);
      const __m512i d = _mm512_loadu_si512(channels[4 * four + 3] + at);
#pragma GCC unroll 2
      for (int part = 0; part < Parts; ++part) {
        const bool upper = first + part;
        const __m512i ab = upper ? _mm512_unpackhi_epi8(a, b) : _mm512_unpacklo_epi8(a, b);
        const __m512i cd = upper ? _mm512_unpackhi_epi8(c, d) : _mm512_unpacklo_epi8(c, d);
        const __m512i bytes[2] = {_mm512_unpacklo_epi16(ab, cd), _mm512_unpackhi_epi16(ab, cd)};
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const __m512i nibbles = i % 2 ? _mm512_srli_epi16(bytes[i / 2], 4) : bytes[i / 2];
          const __m512i codes = ready<Zeros>(nibbles, own[part][i]);
#pragma GCC unroll 4
          for (int t = 0; t < Tokens; ++t)
            sums[part][t][i] = _mm512_dpbusd_epi32(sums[part][t][i], codes, _mm512_set1_epi32(x[four * Tokens + t]));
        }
      }
    }
#pragma GCC unroll 2
    for (int part = 0; part < Parts; ++part)
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) store(sums[part][t], totals[t] + 16 * (first + part));
  }

  // Half bytes of four bytes of each lane -> rows in their order, sixteen of every 32.
  static inline void store(const __m512i (&sums)[4], int32_t* to) {
    const __m512i a = _mm512_unpacklo_epi32(sums[0], sums[1]), b = _mm512_unpackhi_epi32(sums[0], sums[1]);
    const __m512i c = _mm512_unpacklo_epi32(sums[2], sums[3]), d = _mm512_unpackhi_epi32(sums[2], sums[3]);
    const __m512i low_ab = _mm512_shuffle_i32x4(a, b, 0x44), high_ab = _mm512_shuffle_i32x4(a, b, 0xee);
    const __m512i low_cd = _mm512_shuffle_i32x4(c, d, 0x44), high_cd = _mm512_shuffle_i32x4(c, d, 0xee);
    _mm512_store_si512(to, _mm512_shuffle_i32x4(low_ab, low_cd, 0x88));
    _mm512_store_si512(to + 32, _mm512_shuffle_i32x4(low_ab, low_cd, 0xdd));
    _mm512_store_si512(to + 64, _mm512_shuffle_i32x4(high_ab, high_cd, 0x88));
    _mm512_store_si512(to + 96, _mm512_shuffle_i32x4(high_ab, high_cd, 0xdd));
  }
};
