// int4 by input channel with NEON. Included inside the namespace of its instruction set.

struct ColumnFoursNeon {
  static constexpr int kTokens = 2;
  static constexpr int kSafe = 4;  // fours of channels: 16 products of a code up to 15 fit int16

  // Those of even rows, which lie in the lower halves of bytes, and then those of odd ones; a byte each.
  static inline void order_zeros(const uint8_t* zeros, uint32_t* out) {
    uint8_t ordered[128];
    for (int i = 0; i < 64; ++i) {
      ordered[i] = zeros[2 * i];
      ordered[64 + i] = zeros[2 * i + 1];
    }
    memcpy(out, ordered, sizeof ordered);
  }

  template <bool Zeros>
  static inline int8x16_t ready(uint8x16_t codes, uint8x16_t zeros) {
    const uint8x16_t moved = Zeros ? vaddq_u8(codes, zeros) : veorq_u8(codes, vdupq_n_u8(8));
    return vreinterpretq_s8_u8(vandq_u8(moved, vdupq_n_u8(15)));
  }

  // 32 rows at a time: sixteen bytes, whose lower and upper halves are summed up by themselves.
  template <int Tokens, bool Zeros, class Ahead>
  static inline void add(const uint8_t* const* channels, int fours, int64_t at, const int32_t* x, const uint32_t* zeros,
                         int32_t (*totals)[128], Ahead& ahead) {
    const auto* own = reinterpret_cast<const uint8_t*>(zeros);
    for (int part = 0; part < 4; ++part) {
      uint8x16_t even = {}, odd = {};
      if (Zeros) {
        even = vld1q_u8(own + 16 * part);
        odd = vld1q_u8(own + 64 + 16 * part);
      }
      int32x4_t sums[Tokens][2][4] = {};
      for (int begin = 0; begin < fours; begin += kSafe) {
        const int end = begin + kSafe < fours ? begin + kSafe : fours;
        int16x8_t products[Tokens][2][2] = {};
        for (int channel = 4 * begin; channel < 4 * end; ++channel) {
          if (channel % 4 == 0) ahead.template step<4>();
          const uint8x16_t both = vld1q_u8(channels[channel] + at + 16 * part);
          const int8x16_t codes[2] = {ready<Zeros>(both, even), ready<Zeros>(vshrq_n_u8(both, 4), odd)};
#pragma GCC unroll 2
          for (int t = 0; t < Tokens; ++t) {
            const int8x16_t input = vdupq_n_s8(int8_t(x[channel / 4 * Tokens + t] >> 8 * (channel % 4)));
#pragma GCC unroll 2
            for (int i = 0; i < 2; ++i) {
              products[t][i][0] = vmlal_s8(products[t][i][0], vget_low_s8(codes[i]), vget_low_s8(input));
              products[t][i][1] = vmlal_high_s8(products[t][i][1], codes[i], input);
            }
          }
        }
#pragma GCC unroll 8
        for (int i = 0; i < 4 * Tokens; ++i) {
          int32x4_t* to = sums[i / 4][i / 2 % 2] + 2 * (i % 2);
          const int16x8_t more = products[i / 4][i / 2 % 2][i % 2];
          to[0] = vaddw_s16(to[0], vget_low_s16(more));
          to[1] = vaddw_high_s16(to[1], more);
        }
      }
#pragma GCC unroll 2
      for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) vst2q_s32(totals[t] + 32 * part + 8 * i, {{sums[t][0][i], sums[t][1][i]}});
    }
  }
};
