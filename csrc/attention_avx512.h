// Vectors of sixteen for attention.h.
#pragma once

#include <immintrin.h>

#include "attention.h"

namespace {

struct Attention512 {
  using F = __m512;
  using W = __m512i;
  static constexpr int kLanes = 16, kTile = 16;

  static inline F zero() { return _mm512_setzero_ps(); }
  static inline F set(float x) { return _mm512_set1_ps(x); }
  static inline F halves(float lower, float upper) {
    return _mm512_mask_mov_ps(_mm512_set1_ps(lower), 0xff00, _mm512_set1_ps(upper));
  }
  static inline F load(const float* from) { return _mm512_loadu_ps(from); }
  static inline void store(float* to, F x) { _mm512_storeu_ps(to, x); }
  static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static inline W load_words(const uint8_t* from) { return _mm512_loadu_si512(from); }
  static inline F lower(W words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
  static inline F upper(W words) {
    return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int(0xffff0000u))));
  }
  static inline W widen_bytes(const uint8_t* from) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  template <int Bits, int Shift>
  static inline F code(W bytes) {
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(bytes, Shift), _mm512_set1_epi32((1 << Bits) - 1)));
  }

  // out[i] = the sum of x[i]: halves of two vectors are added at a time.
  static inline void totals(const F (&x)[16], float* out) {
    F pairs[8], fours[4];
    for (int i = 0; i < 8; ++i)
      pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
    for (int i = 0; i < 4; ++i) {
      const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
      fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    const F a = _mm512_add_ps(_mm512_shuffle_f32x4(fours[0], fours[1], 0x44), _mm512_shuffle_f32x4(fours[0], fours[1], 0xee));
    const F b = _mm512_add_ps(_mm512_shuffle_f32x4(fours[2], fours[3], 0x44), _mm512_shuffle_f32x4(fours[2], fours[3], 0xee));
    _mm512_store_ps(out, _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)));
  }
};

}  // namespace
