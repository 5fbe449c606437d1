// Vectors of sixteen for attention_blocks.h.
#pragma once

#include "attention_avx512.h"
#include "attention_blocks.h"

namespace {

struct Blocks512 : Attention512 {
  static constexpr int kVectors = 4;
  static inline F add(F a, F b) { return _mm512_add_ps(a, b); }
  static inline F larger(F a, F b) { return _mm512_max_ps(a, b); }
  static inline float largest(F x) { return _mm512_reduce_max_ps(x); }
  static inline float total(F x) { return _mm512_reduce_add_ps(x); }
  static inline F first(F x, int64_t count, float others) {
    const __mmask16 mask = count <= 0 ? 0 : __mmask16((1u << count) - 1);
    return _mm512_mask_mov_ps(_mm512_set1_ps(others), mask, x);
  }
  static inline F exponential(F x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.3f), x);  // in this order a NaN stays one
    const F n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const F r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x));
    return _mm512_scalef_ps(power<Blocks512>(r), n);
  }
};

}  // namespace
