// Vectors of eight, in two registers each, for attention_blocks.h.
#pragma once

#include "attention_blocks.h"
#include "attention_neon.h"

namespace {

struct BlocksNeon : AttentionNeon {
  static constexpr int kVectors = 2;
  static inline F add(const F& a, const F& b) {
    return {{vaddq_f32(a.at[0], b.at[0]), vaddq_f32(a.at[1], b.at[1])}};
  }
  static inline F larger(const F& a, const F& b) {  // b where a is NaN
    return {{vbslq_f32(vcgtq_f32(a.at[0], b.at[0]), a.at[0], b.at[0]), vbslq_f32(vcgtq_f32(a.at[1], b.at[1]), a.at[1], b.at[1])}};
  }
  static inline float largest(const F& x) { return vmaxvq_f32(vmaxq_f32(x.at[0], x.at[1])); }
  static inline float total(const F& x) {
    const float32x4_t four = vaddq_f32(x.at[0], x.at[1]);
    return vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)));
  }
  static inline F first(const F& x, int64_t count, float others) {
    const int32x4_t many = vdupq_n_s32(count < 0 ? 0 : int32_t(count));
    const int32_t lanes[] = {0, 1, 2, 3, 4, 5, 6, 7};
    F out;
    for (int i = 0; i < 2; ++i)
      out.at[i] = vbslq_f32(vcltq_s32(vld1q_s32(lanes + 4 * i), many), x.at[i], vdupq_n_f32(others));
    return out;
  }
  static inline F exponential(const F& x) {
    F rest, scale;
    for (int i = 0; i < 2; ++i) {
      const float32x4_t own = vmaxq_f32(x.at[i], vdupq_n_f32(-87.3f));  // a NaN stays one
      const float32x4_t n = vrndnq_f32(vmulq_n_f32(own, 1.44269504f));
      rest.at[i] = vfmaq_n_f32(vfmsq_n_f32(own, n, 0.693359375f), n, 2.12194440e-4f);
      const int32x4_t bits = vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23);
      scale.at[i] = vreinterpretq_f32_s32(bits);
    }
    const F p = power<BlocksNeon>(rest);
    return {{vmulq_f32(p.at[0], scale.at[0]), vmulq_f32(p.at[1], scale.at[1])}};
  }
};

}  // namespace
