// Dot products of whole numbers, added to sums in int32, with 256-bit vectors: by VNNI where it is there. Included inside
// the namespaces of instruction sets.

#if defined(__AVXVNNI__)
constexpr bool kDotsOfBytes = true;
#else
constexpr bool kDotsOfBytes = false;
#endif

// Two products of int16. Without VNNI, also where it is there: its sums wait longer for each other, which counts when one
// after another goes to the same.
inline __m256i add_words_apart(__m256i sums, __m256i a, __m256i b) {
  return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
}
inline __m256i add_words(__m256i sums, __m256i a, __m256i b) {
#if defined(__AVXVNNI__)
  return _mm256_dpwssd_avx_epi32(sums, a, b);
#else
  return add_words_apart(sums, a, b);
#endif
}

// Four products of bytes, `a` unsigned. Without VNNI, those of two neighbours must fit int16.
inline __m256i add_bytes_apart(__m256i sums, __m256i a, __m256i b) {
  return add_words_apart(sums, _mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1));
}
inline __m256i add_bytes(__m256i sums, __m256i a, __m256i b) {
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(sums, a, b);
#else
  return add_bytes_apart(sums, a, b);
#endif
}
