// int4 of bitmask with NEON. Included inside the namespace of its instruction set.

struct FoursNeon {
  struct Codes {
    uint8x16_t at[4];
  };
  using Sum = EightSums;

  static inline uint8x16_t fifteen() { return vdupq_n_u8(15); }

  static inline Codes spread(uint64_t mask, const uint8_t* from, uint64_t odd) {
    const int8x16_t first = vdupq_n_s8(int8_t(-4 * int(odd))), second = vdupq_n_s8(int8_t(4 * int(odd) - 4));
    uint8_t apart[64 + 8];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const uint8x16_t even = vandq_u8(vshlq_u8(vld1q_u8(from + 16 * i), first), fifteen());
      const uint8x16_t next = vandq_u8(vshlq_u8(vld1q_u8(from + 16 * i + odd), second), fifteen());
      vst1q_u8(apart + 32 * i, vzip1q_u8(even, next));
      vst1q_u8(apart + 32 * i + 16, vzip2q_u8(even, next));
    }
    Codes out;
    spread_bytes(mask, apart, out.at);
    return out;
  }
  static inline void store(const Codes& codes, uint8_t* to) {
    for (int i = 0; i < 4; ++i) vst1q_u8(to + 16 * i, codes.at[i]);
  }

  // Steps: products are of signed bytes, so nothing is added that a total would have to take back.
  static inline uint8x16_t step(uint8x16_t codes) {
    return vreinterpretq_u8_s8(vshrq_n_s8(vshlq_n_s8(vreinterpretq_s8_u8(codes), 4), 4));
  }
  static inline uint8x16_t step(uint8x16_t codes, uint8x16_t zeros) {
    return vsubq_u8(vandq_u8(vaddq_u8(codes, zeros), fifteen()), zeros);
  }
  template <bool Zeros, int Groups>
  static inline Codes ready(const Codes& codes, const uint8_t* zeros) {
    Codes out;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      out.at[i] = Zeros ? step(codes.at[i], vdupq_n_u8(zeros[Groups == 2 ? i / 2 : 0])) : step(codes.at[i]);
    return out;
  }

  struct Total {  // each lane of four columns
    int32x4_t at[4];
  };

  template <bool>
  static inline Total start(const int32_t*) {
    return {};
  }
  static inline Total add(Total total, const Codes& codes, const int8_t* x) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int8x16_t own = vreinterpretq_s8_u8(codes.at[i]), inputs = vld1q_s8(x + 16 * i);
      const int16x8_t low = vmull_s8(vget_low_s8(own), vget_low_s8(inputs)), high = vmull_high_s8(own, inputs);
      total.at[i] = vpadalq_s16(total.at[i], vpaddq_s16(low, high));
    }
    return total;
  }

  // Each half of a step has a scale of its own, or both have one.
  template <int Groups>
  static inline Sum finish(Sum sum, const Total& total, const float* scales) {
    const auto& at = total.at;
    if (Groups == 1) return scaled(sum, vaddq_s32(at[0], at[2]), vaddq_s32(at[1], at[3]), scales[0]);
    return scaled(scaled(sum, at[0], at[1], scales[0]), at[2], at[3], scales[1]);
  }
  static inline Sum scaled(const Sum& sum, int32x4_t low, int32x4_t high, float scale) {
    return {{vfmaq_n_f32(sum.at[0], vcvtq_f32_s32(low), scale), vfmaq_n_f32(sum.at[1], vcvtq_f32_s32(high), scale)}};
  }
  static inline float sum(const Sum& sum) { return total_of(sum); }
};
