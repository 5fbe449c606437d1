// NEON, as every 64-bit ARM has it: sums of eight float32 lie in two registers and are added in the order of AVX2, so that
// bfloat16 products have the bits that they have there.
#include <arm_neon.h>

#include "attention_blocks_neon.h"
#include "attention_neon.h"
#include "decode.h"
#include "gemv.h"
#include "places.h"

namespace {

#include "float_places.h"

inline float32x4_t widen_low(uint16x8_t bits) { return vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(bits), 16)); }
inline float32x4_t widen_high(uint16x8_t bits) { return vreinterpretq_f32_u32(vshll_high_n_u16(bits, 16)); }

// In byte i how many bits of the mask lie before its byte i.
inline uint64_t bits_before(uint64_t mask) {
  const uint64_t counts = vget_lane_u64(vreinterpret_u64_u8(vcnt_u8(vcreate_u8(mask))), 0);
  return counts * 0x0101010101010101u << 8;
}

inline uint8x8_t places_of(uint64_t mask, int eight) { return vcreate_u8(kPlaces.of[mask >> 8 * eight & 255]); }

// Bytes that follow each other -> where the 64 bits of a mask are; at most eight are read for each eight.
inline void spread_bytes(uint64_t mask, const uint8_t* from, uint8x16_t (&out)[4]) {
  const uint64_t before = bits_before(mask);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const uint8_t *first = from + (before >> 16 * i & 255), *second = from + (before >> (16 * i + 8) & 255);
    out[i] = vcombine_u8(vtbl1_u8(vld1_u8(first), places_of(mask, 2 * i)),
                         vtbl1_u8(vld1_u8(second), places_of(mask, 2 * i + 1)));
  }
}

// The same for four bytes of every eight; `kept` are all 32.
inline void spread_half_of_bytes(uint64_t mask, const uint8x16_t (&kept)[2], uint8x16_t (&out)[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const uint64_t moved = i % 2 ? 0x0808080808080808u : 0;  // to the values of its eights
    const uint8x16_t places = vcombine_u8(places_of(mask, 2 * i), places_of(mask, 2 * i + 1));
    const uint8x16_t starts = vcombine_u8(vcreate_u8(moved), vcreate_u8(moved + 0x0404040404040404u));
    out[i] = vqtbl1q_u8(kept[i / 2], vaddq_u8(places, starts));
  }
}

struct EightSums {
  float32x4_t at[2];
};

inline float total_of(const EightSums& sums) { return vaddvq_f32(vaddq_f32(sums.at[0], sums.at[1])); }

#include "columns_fours_neon.h"
#include "columns_neon.h"
#include "nibbles_neon.h"
#include "rows_neon.h"

struct Neon : ColumnsNeon {
  using Fours = FoursNeon;
  using Rows = RowsNeon;
  using ColumnFours = ColumnFoursNeon;
  using X = float;
  using Q = int8_t;
  static constexpr int kShift = 0, kWeightShift = 0;

  struct Floats {
    float32x4_t at[8];
  };
  using Sum = EightSums;
  struct Bytes {
    uint8x16_t at[4];
  };
  struct Total {
    int32x4_t at[2];
  };

  static X input(uint16_t bits) { return to_float(bits); }
  static float output(X x) { return x; }

  static inline Floats load_floats(const uint16_t* from) {
    Floats out;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const uint16x8_t eight = vld1q_u16(from + 8 * i);
      out.at[2 * i] = widen_low(eight);
      out.at[2 * i + 1] = widen_high(eight);
    }
    return out;
  }
  // Eight number `i` of a mask, of which `kept` holds the values.
  static inline void spread_eight(uint32_t mask, int i, uint8x16_t kept, Floats& out) {
    const uint8_t* places = kFloatPlaces.of[mask >> 8 * i & 255];
    out.at[2 * i] = vreinterpretq_f32_u8(vqtbl1q_u8(kept, vld1q_u8(places)));
    out.at[2 * i + 1] = vreinterpretq_f32_u8(vqtbl1q_u8(kept, vld1q_u8(places + 16)));
  }
  static inline Floats expand_floats(uint32_t mask, const uint16_t* from) {
    const uint64_t before = bits_before(mask);
    Floats out;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      spread_eight(mask, i, vreinterpretq_u8_u16(vld1q_u16(from + (before >> 8 * i & 255))), out);
    return out;
  }
  static inline Floats expand_half_floats(uint32_t mask, const uint16_t* from) {  // four values for each eight weights
    Floats out;
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const uint8x16_t kept = vreinterpretq_u8_u16(vld1q_u16(from + 8 * i));
      spread_eight(mask, 2 * i, kept, out);
      spread_eight(mask, 2 * i + 1, vextq_u8(kept, kept, 8), out);
    }
    return out;
  }
  static inline void store_floats(const Floats& values, uint16_t* to) {
    for (int i = 0; i < 8; ++i) vst1_u16(to + 4 * i, vshrn_n_u32(vreinterpretq_u32_f32(values.at[i]), 16));
  }

  static inline Sum multiply(Sum sum, const Floats& weights, const X* x) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) sum.at[i % 2] = vfmaq_f32(sum.at[i % 2], weights.at[i], vld1q_f32(x + 4 * i));
    return sum;
  }
  static inline Sum multiply_half(Sum sum, const uint16_t* weights, const X* x) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const uint16x8_t eight = vld1q_u16(weights + 8 * i);
      sum.at[0] = vfmaq_f32(sum.at[0], widen_low(eight), vld1q_f32(x + 8 * i));
      sum.at[1] = vfmaq_f32(sum.at[1], widen_high(eight), vld1q_f32(x + 8 * i + 4));
    }
    return sum;
  }
  struct PairSum {
    Sum rows[2];
  };
  static inline PairSum multiply_pair(PairSum sums, const Floats& weights, const X* x) {  // two rows of 16 weights
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      float32x4_t& sum = sums.rows[i / 4].at[i % 2];
      sum = vfmaq_f32(sum, weights.at[i], vld1q_f32(x + 4 * (i % 4)));
    }
    return sums;
  }
  static inline void sum_pair(const PairSum& sums, float& upper, float& lower) {
    upper = total_of(sums.rows[0]);
    lower = total_of(sums.rows[1]);
  }
  static inline Sum add(const Sum& a, const Sum& b) {
    return {{vaddq_f32(a.at[0], b.at[0]), vaddq_f32(a.at[1], b.at[1])}};
  }
  static inline float sum(const Sum& sum) { return total_of(sum); }

  static inline Bytes load_bytes(const int8_t* from) {
    Bytes out;
    for (int i = 0; i < 4; ++i) out.at[i] = vreinterpretq_u8_s8(vld1q_s8(from + 16 * i));
    return out;
  }
  static inline Bytes expand_bytes(uint64_t mask, const int8_t* from) {
    Bytes out;
    spread_bytes(mask, reinterpret_cast<const uint8_t*>(from), out.at);
    return out;
  }
  static inline Bytes expand_half_bytes(uint64_t mask, const int8_t* from) {
    const uint8x16_t kept[2] = {vreinterpretq_u8_s8(vld1q_s8(from)), vreinterpretq_u8_s8(vld1q_s8(from + 16))};
    Bytes out;
    spread_half_of_bytes(mask, kept, out.at);
    return out;
  }
  static inline void store_bytes(const Bytes& values, int8_t* to) {
    for (int i = 0; i < 4; ++i) vst1q_s8(to + 16 * i, vreinterpretq_s8_u8(values.at[i]));
  }
  static inline Total multiply(Total total, const Bytes& weights, const Q* x) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // inputs are at most 127 in size, so two products fit int16
      const int8x16_t own = vreinterpretq_s8_u8(weights.at[i]), inputs = vld1q_s8(x + 16 * i);
      const int16x8_t low = vmull_s8(vget_low_s8(own), vget_low_s8(inputs));
      total.at[i % 2] = vpadalq_s16(total.at[i % 2], vmlal_high_s8(low, own, inputs));
    }
    return total;
  }
  static inline int64_t total(const Total& total) { return vaddlvq_s32(total.at[0]) + vaddlvq_s32(total.at[1]); }
};

}  // namespace

const sparity::Kernels sparity::neon_kernels = kernels<Neon>();
const sparity::AttentionKernels sparity::neon_attention = attention_kernels<AttentionNeon>();
const sparity::BlockKernels sparity::neon_blocks = block_kernels<FloatPanels<BlocksNeon>>();
