// Sixteen rows side by side with NEON, four in a register. Included inside the namespace of its instruction set.

struct RowsNeon {
  struct Zeros {
    uint8x16_t at[4];  // of each row in four bytes
  };
  struct Total {
    int32x4_t at[4];
  };
  struct Sum {
    float32x4_t at[4];
  };

  static inline Zeros zeros(const uint8_t* from) {
    const uint8x16_t all = vld1q_u8(from), pairs[2] = {vzip1q_u8(all, all), vzip2q_u8(all, all)};
    return {{vzip1q_u8(pairs[0], pairs[0]), vzip2q_u8(pairs[0], pairs[0]), vzip1q_u8(pairs[1], pairs[1]),
             vzip2q_u8(pairs[1], pairs[1])}};
  }

  template <bool>
  static inline Total start(const Zeros&, int32_t) {  // products are of signed steps
    return {};
  }

  static inline int8x16_t four_inputs(const int8_t* x) {
    int32_t four;
    memcpy(&four, x, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
  }

  // Steps are at most 15 and inputs 127 in size, so a lane's eight products of 32 columns fit int16, and two lanes' too.
  template <bool WithZeros, int Tokens>
  static inline void add(Total* totals, const uint8_t* codes, const Zeros& zeros, const int8_t* x, int64_t stride) {
#pragma GCC unroll 4
    for (int rows = 0; rows < 4; ++rows) {
      int16x8_t low[Tokens] = {}, high[Tokens] = {};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const uint8x16_t both = vld1q_u8(codes + 64 * i + 16 * rows);
        int8x16_t even, odd;
        if (WithZeros) {
          even = vreinterpretq_s8_u8(FoursNeon::step(both, zeros.at[rows]));
          odd = vreinterpretq_s8_u8(FoursNeon::step(vshrq_n_u8(both, 4), zeros.at[rows]));
        } else {
          even = vreinterpretq_s8_u8(FoursNeon::step(both));
          odd = vshrq_n_s8(vreinterpretq_s8_u8(both), 4);
        }
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) {
          const int8x16_t first = four_inputs(x + t * stride + 8 * i), second = four_inputs(x + t * stride + 8 * i + 4);
          low[t] = vmlal_s8(vmlal_s8(low[t], vget_low_s8(even), vget_low_s8(first)), vget_low_s8(odd), vget_low_s8(second));
          high[t] = vmlal_high_s8(vmlal_high_s8(high[t], even, first), odd, second);
        }
      }
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t)
        totals[t].at[rows] = vpadalq_s16(totals[t].at[rows], vpaddq_s16(low[t], high[t]));
    }
  }

  struct PairZeros {
    uint8x16_t at[2];  // of each row in two bytes
  };
  static inline PairZeros pair_zeros(const uint8_t* from) {
    const uint8x16_t all = from ? vld1q_u8(from) : vdupq_n_u8(8);
    return {{vzip1q_u8(all, all), vzip2q_u8(all, all)}};
  }

  // Eight rows at a time, two bytes of each; sixteen products of 32 columns fit int16.
  template <int Tokens>
  static inline void add_pairs(Total* totals, const uint8_t* places, const uint8_t* codes, const PairZeros& zeros,
                               const int8_t* x, int64_t stride) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      int16x8_t sums[Tokens] = {};
#pragma GCC unroll 8
      for (int four = 0; four < 8; ++four) {
        const uint8x16_t where = vld1q_u8(places + 32 * (four / 4) + 16 * half);
        const uint8x16_t both = vld1q_u8(codes + 32 * (four / 2) + 16 * half);
        const uint8x16_t whole = four % 2 ? vshrq_n_u8(both, 4) : vandq_u8(both, vdupq_n_u8(15));
        const uint8x16_t place = vandq_u8(vshlq_u8(where, vdupq_n_s8(int8_t(-2 * (four % 4)))), vdupq_n_u8(3));
        const int8x16_t steps = vreinterpretq_s8_u8(vsubq_u8(whole, zeros.at[half]));
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) {
          const int8x16_t kept = vqtbl1q_s8(four_inputs(x + t * stride + 4 * four), place);
          const int16x8_t low = vmull_s8(vget_low_s8(steps), vget_low_s8(kept));
          sums[t] = vaddq_s16(sums[t], vpaddq_s16(low, vmull_high_s8(steps, kept)));
        }
      }
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) {
        int32x4_t* to = totals[t].at + 2 * half;
        to[0] = vaddw_s16(to[0], vget_low_s16(sums[t]));
        to[1] = vaddw_high_s16(to[1], sums[t]);
      }
    }
  }

  static inline Sum scales(const SparityMatrix& weight, int64_t at) {
    Sum out;
    for (int i = 0; i < 4; ++i, at += 4) {
      if (weight.scale_type == SPARITY_FLOAT32) {
        out.at[i] = vld1q_f32(static_cast<const float*>(weight.group_scales) + at);
        continue;
      }
      const uint16x4_t halves = vld1_u16(static_cast<const uint16_t*>(weight.group_scales) + at);
      out.at[i] = weight.scale_type == SPARITY_FLOAT16 ? vcvt_f32_f16(vreinterpret_f16_u16(halves))
                                                       : vreinterpretq_f32_u32(vshll_n_u16(halves, 16));
    }
    return out;
  }

  static inline Sum finish(Sum sum, const Total& total, const Sum& own, float theirs) {
    for (int i = 0; i < 4; ++i)
      sum.at[i] = vfmaq_f32(sum.at[i], vcvtq_f32_s32(total.at[i]), vmulq_n_f32(own.at[i], theirs));
    return sum;
  }

  static inline void store(const Sum& sum, float* to) {
    for (int i = 0; i < 4; ++i) vst1q_f32(to + 4 * i, sum.at[i]);
  }
};
