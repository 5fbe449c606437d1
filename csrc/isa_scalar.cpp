// Plain C++: the slowest and the plainest; every other instruction set is tested against the same reference.
#include "attention_scalar.h"
#include "attention_blocks_scalar.h"
#include "decode.h"
#include "gemv.h"

namespace {

struct ScalarFours {
  struct Codes {
    uint8_t at[64];
  };
  struct Sum {
    float at;
  };
  struct Total {  // of each half of a step
    int32_t at[2];
  };

  static Codes spread(uint64_t mask, const uint8_t* from, uint64_t odd) {
    Codes out;
    uint64_t place = odd;
    for (int i = 0; i < 64; ++i) {
      out.at[i] = mask >> i & 1 ? uint8_t(from[place / 2] >> 4 * (place % 2) & 15) : uint8_t(0);
      place += mask >> i & 1;
    }
    return out;
  }
  static void store(const Codes& codes, uint8_t* to) { memcpy(to, codes.at, 64); }

  template <bool Zeros, int Groups>
  static Codes ready(Codes codes, const uint8_t* zeros) {  // code - zero, unlike vectors
    for (int i = 0; i < 64; ++i) {
      const int zero = Zeros ? zeros[Groups == 2 ? i / 32 : 0] : 8;
      codes.at[i] = uint8_t(((codes.at[i] + zero) & 15) - zero);
    }
    return codes;
  }
  template <bool>
  static Total start(const int32_t*) {
    return {};
  }
  static Total add(Total total, const Codes& codes, const int8_t* x) {
    for (int i = 0; i < 64; ++i) total.at[i / 32] += int8_t(codes.at[i]) * x[i];
    return total;
  }
  template <int Groups>
  static Sum finish(Sum sum, const Total& total, const float* scales) {
    if (Groups == 1) return {sum.at + float(total.at[0] + total.at[1]) * scales[0]};
    return {sum.at + float(total.at[0]) * scales[0] + float(total.at[1]) * scales[1]};
  }
  static float sum(const Sum& sum) { return sum.at; }
};

struct ScalarRows {
  struct Zeros {
    uint8_t at[sparity::kSideBySide];
  };
  struct Total {
    int32_t at[sparity::kSideBySide];
  };
  struct Sum {
    float at[sparity::kSideBySide];
  };

  static Zeros zeros(const uint8_t* from) {
    Zeros out;
    memcpy(out.at, from, sizeof out.at);
    return out;
  }
  template <bool>
  static Total start(const Zeros&, int32_t) {
    return {};
  }
  template <bool WithZeros, int Tokens>
  static void add(Total* totals, const uint8_t* codes, const Zeros& zeros, const int8_t* x, int64_t stride) {
    for (int i = 0; i < 4; ++i)
      for (int row = 0; row < sparity::kSideBySide; ++row)
        for (int j = 0; j < 8; ++j) {
          const int zero = WithZeros ? zeros.at[row] : 8;
          const int code = codes[64 * i + 4 * row + j % 4] >> (j / 4 * 4);
          for (int t = 0; t < Tokens; ++t)
            totals[t].at[row] += (((code + zero) & 15) - zero) * x[t * stride + 8 * i + j];
        }
  }
  using PairZeros = Zeros;
  static PairZeros pair_zeros(const uint8_t* from) {
    Zeros out;
    memset(out.at, 8, sizeof out.at);
    return from ? zeros(from) : out;
  }
  template <int Tokens>
  static void add_pairs(Total* totals, const uint8_t* places, const uint8_t* codes, const PairZeros& zeros,
                        const int8_t* x, int64_t stride) {
    for (int four = 0; four < 8; ++four)
      for (int row = 0; row < sparity::kSideBySide; ++row)
        for (int kept = 0; kept < 2; ++kept) {
          const int place = places[32 * (four / 4) + 2 * row + kept] >> four % 4 * 2 & 3;
          const int code = codes[32 * (four / 2) + 2 * row + kept] >> four % 2 * 4 & 15;
          for (int t = 0; t < Tokens; ++t) totals[t].at[row] += (code - zeros.at[row]) * x[t * stride + 4 * four + place];
        }
  }
  static Sum scales(const SparityMatrix& weight, int64_t at) {
    Sum out;
    for (int row = 0; row < sparity::kSideBySide; ++row) out.at[row] = scale_of(weight, at + row);
    return out;
  }
  static Sum finish(Sum sum, const Total& total, const Sum& own, float theirs) {
    for (int row = 0; row < sparity::kSideBySide; ++row)
      sum.at[row] = fmaf(float(total.at[row]), own.at[row] * theirs, sum.at[row]);
    return sum;
  }
  static void store(const Sum& sum, float* to) { memcpy(to, sum.at, sizeof sum.at); }
};

struct ScalarColumnFours {
  static constexpr int kTokens = 2;

  static void order_zeros(const uint8_t* zeros, uint32_t* out) {
    for (int i = 0; i < 128; ++i) out[i] = zeros[i];
  }
  template <int Tokens, bool Zeros, class Ahead>
  static void add(const uint8_t* const* channels, int fours, int64_t at, const int32_t* x, const uint32_t* zeros,
                  int32_t (*totals)[128], Ahead& ahead) {
    memset(totals, 0, Tokens * sizeof *totals);
    for (int i = 0; i < 4 * fours; ++i) {
      if (i % 4 == 0) ahead.template step<1>();
      for (int t = 0; t < Tokens; ++t) {
        int8_t inputs[4];
        memcpy(inputs, x + i / 4 * Tokens + t, 4);
        for (int row = 0; row < 128; ++row) {
          const uint32_t code = uint32_t(channels[i][at + row / 2] >> 4 * (row % 2));
          totals[t][row] += int32_t((code + (Zeros ? zeros[row] : 8)) & 15) * inputs[i % 4];
        }
      }
    }
  }
};

struct Scalar {
  using Fours = ScalarFours;
  using Rows = ScalarRows;
  using ColumnFours = ScalarColumnFours;
  using X = float;
  using Q = int16_t;
  static constexpr int kShift = 0, kWeightShift = 0;
  static constexpr int kVector = 16;

  struct Floats {
    float at[32];
  };
  struct Sum {
    float at[8];
  };
  struct Bytes {
    int8_t at[64];
  };
  using Total = int64_t;

  static X input(uint16_t bits) { return to_float(bits); }
  static float output(X x) { return x; }

  static Floats load_floats(const uint16_t* from) {
    Floats out;
    for (int i = 0; i < 32; ++i) out.at[i] = to_float(from[i]);
    return out;
  }
  static Floats expand_floats(uint32_t mask, const uint16_t* from) {
    Floats out;
    for (int i = 0; i < 32; ++i) out.at[i] = mask >> i & 1 ? to_float(*from++) : 0.0f;
    return out;
  }
  static Floats expand_half_floats(uint32_t mask, const uint16_t* from) { return expand_floats(mask, from); }
  static void store_floats(const Floats& values, uint16_t* to) {
    for (int i = 0; i < 32; ++i) {
      uint32_t word;
      memcpy(&word, &values.at[i], 4);
      to[i] = uint16_t(word >> 16);
    }
  }
  static Sum multiply(Sum sum, const Floats& weights, const X* x) {
    for (int i = 0; i < 32; ++i) sum.at[i % 8] += weights.at[i] * x[i];
    return sum;
  }
  static Sum multiply_half(Sum sum, const uint16_t* weights, const X* x) {
    for (int i = 0; i < 16; ++i) sum.at[i % 8] += to_float(weights[i]) * x[i];
    return sum;
  }
  struct PairSum {
    Sum rows[2];
  };
  static PairSum multiply_pair(PairSum sums, const Floats& weights, const X* x) {  // two rows of 16 weights
    for (int i = 0; i < 32; ++i) sums.rows[i / 16].at[i % 8] += weights.at[i] * x[i % 16];
    return sums;
  }
  static void sum_pair(const PairSum& sums, float& upper, float& lower) {
    upper = sum(sums.rows[0]);
    lower = sum(sums.rows[1]);
  }
  static Sum add(const Sum& a, const Sum& b) {
    Sum out;
    for (int i = 0; i < 8; ++i) out.at[i] = a.at[i] + b.at[i];
    return out;
  }
  static float sum(const Sum& sum) {
    float out = 0;
    for (float part : sum.at) out += part;
    return out;
  }

  static Bytes load_bytes(const int8_t* from) {
    Bytes out;
    memcpy(out.at, from, 64);
    return out;
  }
  static Bytes expand_bytes(uint64_t mask, const int8_t* from) {
    Bytes out;
    for (int i = 0; i < 64; ++i) out.at[i] = mask >> i & 1 ? *from++ : int8_t(0);
    return out;
  }
  static Bytes expand_half_bytes(uint64_t mask, const int8_t* from) { return expand_bytes(mask, from); }
  static void store_bytes(const Bytes& values, int8_t* to) { memcpy(to, values.at, 64); }
  static Total multiply(Total total, const Bytes& weights, const Q* x) {
    for (int i = 0; i < 64; ++i) total += int32_t(weights.at[i]) * x[i];
    return total;
  }
  static int64_t total(Total total) { return total; }

  static constexpr int kTogether = 1, kFloatTokens = 4;
  using Multiplier = float;
  static float multiplier(float x, float) { return x; }
  static constexpr int64_t float_place(int64_t row) { return row; }

  template <int Count, int Tokens>
  static void add_floats(const uint16_t* const* channels, int64_t row, const float (&x)[Count][Tokens], float* sums,
                         int64_t width) {
    for (int t = 0; t < Tokens; ++t)
      for (int i = 0; i < Count; ++i)
        for (int at = 0; at < 32; ++at) sums[t * width + at] += to_float(channels[i][row + at]) * x[i][t];
  }
  template <int Fours, int Tokens>
  static void add_bytes(const int8_t* const* channels, int64_t row, const int32_t (&x)[Fours][Tokens], int32_t* sums,
                        int64_t width) {
    for (int t = 0; t < Tokens; ++t)
      for (int i = 0; i < 4 * Fours; ++i) {
        int8_t inputs[4];
        memcpy(inputs, &x[i / 4][t], 4);
        for (int at = 0; at < 64; ++at)
          sums[t * width + ByteColumns::place<Scalar>(at)] += int32_t(channels[i][row + at]) * inputs[i % 4];
      }
  }
};

}  // namespace

const sparity::Kernels sparity::scalar_kernels = kernels<Scalar>();
const sparity::DecodeKernels sparity::scalar_decode = decode_kernels();
const sparity::AttentionKernels sparity::scalar_attention = attention_kernels<AttentionPlain>();
const sparity::BlockKernels sparity::scalar_blocks = block_kernels<FloatPanels<BlocksPlain>>();
