// What NEON adds to a tile of weights by input channel. Included inside the namespace of its instruction set.

struct ColumnsNeon {
  static constexpr int kVector = 16;
  static constexpr int kTogether = 1, kFloatTokens = 4;
  using Multiplier = float;

  static inline float multiplier(float x, float) { return x; }
  static constexpr int64_t float_place(int64_t row) { return row; }

  // Eight rows at a time: their sums for four tokens stay in registers.
  template <int Count, int Tokens>
  static inline void add_floats(const uint16_t* const* channels, int64_t row, const float (&x)[Count][Tokens],
                                float* sums, int64_t width) {
    for (int at = 0; at < 32; at += 8) {
      float32x4_t low[Tokens], high[Tokens];
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) {
        low[t] = vld1q_f32(sums + t * width + at);
        high[t] = vld1q_f32(sums + t * width + at + 4);
      }
#pragma GCC unroll 8
      for (int i = 0; i < Count; ++i) {
        const uint16x8_t weights = vld1q_u16(channels[i] + row + at);
        const float32x4_t first = widen_low(weights), second = widen_high(weights);
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) {
          low[t] = vfmaq_n_f32(low[t], first, x[i][t]);
          high[t] = vfmaq_n_f32(high[t], second, x[i][t]);
        }
      }
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) {
        vst1q_f32(sums + t * width + at, low[t]);
        vst1q_f32(sums + t * width + at + 4, high[t]);
      }
    }
  }

  // Sixteen rows at a time; the products of two channels fit int16, as inputs are at most 127 in size.
  template <int Fours, int Tokens>
  static inline void add_bytes(const int8_t* const* channels, int64_t row, const int32_t (&x)[Fours][Tokens],
                               int32_t* sums, int64_t width) {
    for (int at = 0; at < 64; at += 16) {
      int32x4_t totals[Tokens][4];
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) totals[t][i] = vld1q_s32(sums + t * width + at + 4 * i);
#pragma GCC unroll 8
      for (int pair = 0; pair < 2 * Fours; ++pair) {
        const int8x16_t first = vld1q_s8(channels[2 * pair] + row + at);
        const int8x16_t second = vld1q_s8(channels[2 * pair + 1] + row + at);
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) {
          const int32_t inputs = x[pair / 2][t] >> 16 * (pair % 2);
          const int8x16_t one = vdupq_n_s8(int8_t(inputs)), other = vdupq_n_s8(int8_t(inputs >> 8));
          const int16x8_t low = vmlal_s8(vmull_s8(vget_low_s8(first), vget_low_s8(one)), vget_low_s8(second), vget_low_s8(other));
          const int16x8_t high = vmlal_high_s8(vmull_high_s8(first, one), second, other);
          totals[t][0] = vaddw_s16(totals[t][0], vget_low_s16(low));
          totals[t][1] = vaddw_high_s16(totals[t][1], low);
          totals[t][2] = vaddw_s16(totals[t][2], vget_low_s16(high));
          totals[t][3] = vaddw_high_s16(totals[t][3], high);
        }
      }
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) vst1q_s32(sums + t * width + at + 4 * i, totals[t][i]);
    }
  }
};
