// Vectors of eight, in two registers each, for attention.h; sums are added in the order of AVX2.
#pragma once

#include <arm_neon.h>

#include "attention.h"

namespace {

struct AttentionNeon {
  struct F {
    float32x4_t at[2];
  };
  struct W {
    uint32x4_t at[2];
  };
  static constexpr int kLanes = 8, kTile = 8;

  static inline F set(float x) { return {{vdupq_n_f32(x), vdupq_n_f32(x)}}; }
  static inline F zero() { return set(0); }
  static inline F halves(float lower, float upper) { return {{vdupq_n_f32(lower), vdupq_n_f32(upper)}}; }
  static inline F load(const float* from) { return {{vld1q_f32(from), vld1q_f32(from + 4)}}; }
  static inline void store(float* to, const F& x) {
    vst1q_f32(to, x.at[0]);
    vst1q_f32(to + 4, x.at[1]);
  }
  static inline F fma(const F& a, const F& b, const F& c) {
    return {{vfmaq_f32(c.at[0], a.at[0], b.at[0]), vfmaq_f32(c.at[1], a.at[1], b.at[1])}};
  }
  static inline W load_words(const uint8_t* from) {
    return {{vreinterpretq_u32_u8(vld1q_u8(from)), vreinterpretq_u32_u8(vld1q_u8(from + 16))}};
  }
  static inline F lower(const W& words) {
    return {{vreinterpretq_f32_u32(vshlq_n_u32(words.at[0], 16)), vreinterpretq_f32_u32(vshlq_n_u32(words.at[1], 16))}};
  }
  static inline F upper(const W& words) {
    const uint32x4_t mask = vdupq_n_u32(0xffff0000u);
    return {{vreinterpretq_f32_u32(vandq_u32(words.at[0], mask)), vreinterpretq_f32_u32(vandq_u32(words.at[1], mask))}};
  }
  static inline W widen_bytes(const uint8_t* from) {
    const uint16x8_t eight = vmovl_u8(vld1_u8(from));
    return {{vmovl_u16(vget_low_u16(eight)), vmovl_high_u16(eight)}};
  }
  template <int Bits, int Shift>
  static inline F code(const W& bytes) {
    F out;
    for (int i = 0; i < 2; ++i) {
      const uint32x4_t moved = vshlq_u32(bytes.at[i], vdupq_n_s32(-Shift));
      out.at[i] = vcvtq_f32_u32(vandq_u32(moved, vdupq_n_u32((1u << Bits) - 1)));
    }
    return out;
  }

  // The sums of each half of four vectors.
  static inline float32x4_t half_totals(const F* x, int half) {
    return vpaddq_f32(vpaddq_f32(x[0].at[half], x[1].at[half]), vpaddq_f32(x[2].at[half], x[3].at[half]));
  }
  // out[i] = the sum of x[i].
  static inline void totals(const F (&x)[8], float* out) {
    for (int i = 0; i < 8; i += 4) vst1q_f32(out + i, vaddq_f32(half_totals(x + i, 0), half_totals(x + i, 1)));
  }
};

}  // namespace
