// AVX-512 with BF16 (dot products of pairs), VBMI, VBMI2 (values spread by mask) and VNNI (dot products of bytes).
#include <immintrin.h>

#include "attention_avx512.h"
#include "attention_blocks_avx512.h"
#include "gemv.h"

namespace {

// vpexpand waits for the old value of its destination although it zeroes it, so the register is cleared first. Inline
// assembly also keeps the compiler from folding the load into it: that form is slow on Zen.
inline __m512i expand_words(__mmask32 mask, __m512i kept) {
  __m512i out;
  asm("vpxord %0, %0, %0\n\tvpexpandw %1, %0%{%2%}%{z%}" : "=&v"(out) : "v"(kept), "Yk"(mask));
  return out;
}

inline __m512i expand_all_bytes(__mmask64 mask, __m512i kept) {
  __m512i out;
  asm("vpxord %0, %0, %0\n\tvpexpandb %1, %0%{%2%}%{z%}" : "=&v"(out) : "v"(kept), "Yk"(mask));
  return out;
}

#include "columns_avx512.h"
#include "columns_fours_avx512.h"
#include "nibbles_avx512.h"
#include "pairs_avx2.h"
#include "rows_avx512.h"

struct Avx512Bf16 : Columns512 {
  using Fours = Fours512;
  using Rows = Rows512;
  using ColumnFours = ColumnFours512;
  using X = uint16_t;
  using Q = uint8_t;
  static constexpr int kShift = 128;  // vpdpbusd wants one unsigned side
  static constexpr int kWeightShift = 128;  // in the format columns, where a row's sum depends on the channels
  static constexpr int kTogether = 2;
  using Multiplier = uint32_t;

  struct Floats {
    __m512i at;
  };
  struct Sum {
    __m512 at;
  };
  struct Bytes {
    __m512i at;
  };
  struct Total {
    __m512i at;
  };

  static X input(uint16_t bits) { return bits; }
  static float output(X x) { return to_float(x); }

  static inline Floats load_floats(const uint16_t* from) { return {_mm512_loadu_si512(from)}; }
  static inline Floats expand_floats(uint32_t mask, const uint16_t* from) {
    return {expand_words(mask, _mm512_loadu_si512(from))};
  }
  static inline Floats expand_half_floats(uint32_t mask, const uint16_t* from) {
    const __m256i kept = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return {expand_words(mask, _mm512_castsi256_si512(kept))};
  }
  static inline void store_floats(const Floats& values, uint16_t* to) { _mm512_storeu_si512(to, values.at); }
  static inline Sum multiply(Sum sum, const Floats& weights, const X* x) {
    sum.at = _mm512_dpbf16_ps(sum.at, (__m512bh)weights.at, (__m512bh)_mm512_loadu_si512(x));
    return sum;
  }
  static inline Sum multiply_half(Sum sum, const uint16_t* weights, const X* x) {
    const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights));
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    sum.at = _mm512_dpbf16_ps(sum.at, (__m512bh)_mm512_zextsi256_si512(w), (__m512bh)_mm512_zextsi256_si512(v));
    return sum;
  }
  using PairSum = Sum;
  static inline PairSum multiply_pair(PairSum sums, const Floats& weights, const X* x) {  // two rows of 16 weights
    const __m256i inputs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    sums.at = _mm512_dpbf16_ps(sums.at, (__m512bh)weights.at, (__m512bh)_mm512_broadcast_i64x4(inputs));
    return sums;
  }
  static inline void sum_pair(const PairSum& sums, float& upper, float& lower) {
    upper = _mm512_mask_reduce_add_ps(0x00ff, sums.at);
    lower = _mm512_mask_reduce_add_ps(0xff00, sums.at);
  }
  static inline Sum add(const Sum& a, const Sum& b) { return {_mm512_add_ps(a.at, b.at)}; }
  static inline float sum(const Sum& sum) { return _mm512_reduce_add_ps(sum.at); }

  static inline Bytes load_bytes(const int8_t* from) { return {_mm512_loadu_si512(from)}; }
  static inline Bytes expand_bytes(uint64_t mask, const int8_t* from) {
    return {expand_all_bytes(mask, _mm512_loadu_si512(from))};
  }
  static inline Bytes expand_half_bytes(uint64_t mask, const int8_t* from) {
    const __m256i kept = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return {expand_all_bytes(mask, _mm512_castsi256_si512(kept))};
  }
  static inline void store_bytes(const Bytes& values, int8_t* to) { _mm512_storeu_si512(to, values.at); }
  static inline Total multiply(Total total, const Bytes& weights, const Q* x) {
    total.at = _mm512_dpbusd_epi32(total.at, _mm512_loadu_si512(x), weights.at);
    return total;
  }
  static inline int64_t total(const Total& total) {
    return _mm512_reduce_add_epi64(_mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(total.at)),
                                                    _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(total.at, 1))));
  }

  // vdpbf16ps adds the upper product of a pair and then, rounded by itself, the lower one.
  static inline uint32_t multiplier(float first, float second) {
    uint32_t upper, lower;
    memcpy(&upper, &first, 4);
    memcpy(&lower, &second, 4);
    return upper | lower >> 16;
  }
  static constexpr int64_t float_place(int64_t row) { return row % 8 / 4 * 16 + row / 8 * 4 + row % 4; }

  template <int Count, int Tokens>
  static inline void add_floats(const uint16_t* const* channels, int64_t row,
                                const uint32_t (&x)[(Count + 1) / 2][Tokens], float* sums, int64_t width) {
    __m512 low[Tokens], high[Tokens];
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) {
      low[t] = _mm512_load_ps(sums + t * width);
      high[t] = _mm512_load_ps(sums + t * width + 16);
    }
#pragma GCC unroll 4
    for (int pair = 0; pair < (Count + 1) / 2; ++pair) {
      const __m512i first = _mm512_loadu_si512(channels[2 * pair] + row);
      const __m512i second =
          2 * pair + 1 < Count ? _mm512_loadu_si512(channels[2 * pair + 1] + row) : _mm512_setzero_si512();
      const __m512i lower = _mm512_unpacklo_epi16(second, first), upper = _mm512_unpackhi_epi16(second, first);
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) {
        const __m512i inputs = _mm512_set1_epi32(int(x[pair][t]));
        low[t] = _mm512_dpbf16_ps(low[t], (__m512bh)lower, (__m512bh)inputs);
        high[t] = _mm512_dpbf16_ps(high[t], (__m512bh)upper, (__m512bh)inputs);
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) {
      _mm512_store_ps(sums + t * width, low[t]);
      _mm512_store_ps(sums + t * width + 16, high[t]);
    }
  }

  template <int Fours, int Tokens>
  static inline void add_bytes(const int8_t* const* channels, int64_t row, const int32_t (&x)[Fours][Tokens],
                               int32_t* sums, int64_t width) {
    add_bytes_by(channels, row, x, sums, width, [](__m512i sum, __m512i weights, __m512i inputs) {
      return _mm512_dpbusd_epi32(sum, _mm512_xor_si512(weights, _mm512_set1_epi8(char(0x80))), inputs);
    });
  }
};

// Pairs of bfloat16 for attention by blocks; vdpbf16ps adds both products to a lane's float32.
struct BfloatPanels : Blocks512 {
  using Number = uint16_t;
  static constexpr int kStep = 2;
  static inline void read(const void* from, int32_t, int64_t at, int64_t count, uint16_t* to) {
    memcpy(to, static_cast<const uint16_t*>(from) + at, size_t(count) * 2);
  }
  static inline F panel(const uint16_t* from) { return _mm512_castsi512_ps(_mm512_loadu_si512(from)); }
  static inline F pair(const uint16_t* from) {
    int32_t both;
    memcpy(&both, from, 4);
    return _mm512_castsi512_ps(_mm512_set1_epi32(both));
  }
  static inline F multiply(F sums, F panel, F pair) {
    return _mm512_dpbf16_ps(sums, (__m512bh)_mm512_castps_si512(panel), (__m512bh)_mm512_castps_si512(pair));
  }
  static inline void put(F x, uint16_t* to) {
    const __m256bh rounded = _mm512_cvtneps_pbh(x);
    memcpy(to, &rounded, sizeof rounded);
  }
};

}  // namespace

const sparity::Kernels sparity::avx512_bf16_kernels = kernels<Avx512Bf16>();
const sparity::AttentionKernels sparity::avx512_bf16_attention = attention_kernels<Attention512>();
const sparity::BlockKernels sparity::avx512_bf16_blocks = block_kernels<BfloatPanels>();
