// Vectors of eight for attention.h.
#pragma once

#include <immintrin.h>

#include "attention.h"

namespace {

struct Attention256 {
  using F = __m256;
  using W = __m256i;
  static constexpr int kLanes = 8, kTile = 8;

  static inline F zero() { return _mm256_setzero_ps(); }
  static inline F set(float x) { return _mm256_set1_ps(x); }
  static inline F halves(float lower, float upper) {
    return _mm256_blend_ps(_mm256_set1_ps(lower), _mm256_set1_ps(upper), 0xf0);
  }
  static inline F load(const float* from) { return _mm256_loadu_ps(from); }
  static inline void store(float* to, F x) { _mm256_storeu_ps(to, x); }
  static inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static inline W load_words(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
  static inline F lower(W words) { return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)); }
  static inline F upper(W words) {
    return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(int(0xffff0000u))));
  }
  static inline W widen_bytes(const uint8_t* from) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  }
  template <int Bits, int Shift>
  static inline F code(W bytes) {
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(bytes, Shift), _mm256_set1_epi32((1 << Bits) - 1)));
  }

  // out[i] = the sum of x[i].
  static inline void totals(const F (&x)[8], float* out) {
    F fours[2];
    for (int i = 0; i < 2; ++i)
      fours[i] = _mm256_hadd_ps(_mm256_hadd_ps(x[4 * i], x[4 * i + 1]), _mm256_hadd_ps(x[4 * i + 2], x[4 * i + 3]));
    const F lower = _mm256_permute2f128_ps(fours[0], fours[1], 0x20), upper = _mm256_permute2f128_ps(fours[0], fours[1], 0x31);
    _mm256_store_ps(out, _mm256_add_ps(lower, upper));
  }
};

}  // namespace
