// Vectors of eight for attention_blocks.h.
#pragma once

#include "attention_avx2.h"
#include "attention_blocks.h"

namespace {

struct Blocks256 : Attention256 {
  static constexpr int kVectors = 2;
  static inline F add(F a, F b) { return _mm256_add_ps(a, b); }
  static inline F larger(F a, F b) { return _mm256_max_ps(a, b); }
  static inline float largest(F x) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
  }
  static inline float total(F x) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }
  static inline F first(F x, int64_t count, float others) {
    const int32_t many = count < 0 ? 0 : int32_t(count);
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(many), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return _mm256_blendv_ps(_mm256_set1_ps(others), x, _mm256_castsi256_ps(mask));
  }
  static inline F exponential(F x) {
    x = _mm256_max_ps(_mm256_set1_ps(-87.3f), x);  // in this order a NaN stays one
    const F n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const F r = _mm256_fmadd_ps(n, _mm256_set1_ps(2.12194440e-4f), _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x));
    const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(power<Blocks256>(r), _mm256_castsi256_ps(bits));
  }
};

}  // namespace
