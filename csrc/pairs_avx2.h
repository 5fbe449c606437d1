// Two of four in int4, sixteen rows side by side, with 256-bit vectors: two bytes of each row. Included by every
// instruction set with such vectors, inside its namespace.

// `Rows`, which is derived from this, has plus(total, sums), which adds int16 sums of sixteen rows to a Total.
template <class Rows>
struct PairedSums {
  using PairZeros = __m256i;

  static inline __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

  // In both bytes of each row.
  static inline PairZeros pair_zeros(const uint8_t* from) {
    if (!from) return _mm256_set1_epi8(8);
    const __m256i each = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return _mm256_or_si256(each, _mm256_slli_epi16(each, 8));
  }

  // int16 sums of sixteen rows over 32 columns, in which sixteen products of at most 15 times 127 have room. A shuffle
  // takes of four inputs those where the weights are kept; it reads a place's lower four bits, of which two are the place.
  template <int Tokens, class Total>
  static inline void add_pairs(Total* totals, const uint8_t* places, const uint8_t* codes, PairZeros zeros,
                               const int8_t* x, int64_t stride) {
    const __m256i fifteen = _mm256_set1_epi8(15);
    __m256i sums[Tokens] = {};
#pragma GCC unroll 2
    for (int line = 0; line < 2; ++line) {
      const __m256i where = load(places + 32 * line);
#pragma GCC unroll 4
      for (int four = 0; four < 4; ++four) {
        const __m256i both = load(codes + 64 * line + 32 * (four / 2));
        const __m256i whole = _mm256_and_si256(four % 2 ? _mm256_srli_epi16(both, 4) : both, fifteen);
        const __m256i place = _mm256_and_si256(_mm256_srli_epi16(where, 2 * four), fifteen);
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) {
          int32_t inputs;
          memcpy(&inputs, x + t * stride + 16 * line + 4 * four, 4);
          const __m256i kept = _mm256_shuffle_epi8(_mm256_set1_epi32(inputs), place);
          sums[t] = _mm256_add_epi16(sums[t], _mm256_sub_epi16(_mm256_maddubs_epi16(whole, kept),
                                                               _mm256_maddubs_epi16(zeros, kept)));
        }
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) Rows::plus(totals[t], sums[t]);
  }
};
