// AVX-512 F, BW, DQ and VL, as in the first servers that had it: values are spread as 32-bit words, sixteen at a time.
#include <immintrin.h>

#include "attention_avx512.h"
#include "attention_blocks_avx512.h"
#include "decode.h"
#include "gemv.h"
#include "places.h"

namespace {

inline __m512 widen(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }

#include "columns_avx512.h"
#include "columns_fours_avx2.h"
#include "dots_256.h"
#include "nibbles_avx2.h"
#include "pairs_avx2.h"
#include "row_sums_256.h"
#include "rows_avx2.h"

struct Avx512 : Columns512 {
  using Fours = Fours256;
  using Rows = Rows256;
  using ColumnFours = ColumnFours256;
  using X = float;
  using Q = int16_t;
  static constexpr int kShift = 0, kWeightShift = 0;
  static constexpr int kTogether = 1;
  using Multiplier = float;

  static inline float multiplier(float x, float) { return x; }
  static constexpr int64_t float_place(int64_t row) { return row % 2 * 16 + row / 2; }

  struct Floats {
    __m512 at[2];
  };
  struct Sum {
    __m512 at;
  };
  struct Bytes {
    __m512i at[2];  // 32 weights each, widened
  };
  struct Total {
    __m512i at;
  };

  static X input(uint16_t bits) { return to_float(bits); }
  static float output(X x) { return x; }

  static inline __m256i load_half(const uint16_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  static inline Floats load_floats(const uint16_t* from) {
    return {{widen(load_half(from)), widen(load_half(from + 16))}};
  }
  static inline Floats expand_floats(uint32_t mask, const uint16_t* from) {
    const uint32_t first = mask & 0xffff;
    return {{_mm512_maskz_expand_ps(__mmask16(first), widen(load_half(from))),
             _mm512_maskz_expand_ps(__mmask16(mask >> 16), widen(load_half(from + __builtin_popcount(first))))}};
  }
  static inline Floats expand_half_floats(uint32_t mask, const uint16_t* from) {  // eight values for sixteen weights
    const __m512 kept = widen(load_half(from));
    const __m512 later = _mm512_shuffle_f32x4(kept, kept, 0xee);
    return {{_mm512_maskz_expand_ps(__mmask16(mask), kept), _mm512_maskz_expand_ps(__mmask16(mask >> 16), later)}};
  }
  static inline void store_floats(const Floats& values, uint16_t* to) {
    for (int i = 0; i < 2; ++i) {
      const __m256i packed = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(values.at[i]), 16));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16 * i), packed);
    }
  }
  static inline Sum multiply(Sum sum, const Floats& weights, const X* x) {
    sum.at = _mm512_fmadd_ps(weights.at[0], _mm512_loadu_ps(x), sum.at);
    sum.at = _mm512_fmadd_ps(weights.at[1], _mm512_loadu_ps(x + 16), sum.at);
    return sum;
  }
  static inline Sum multiply_half(Sum sum, const uint16_t* weights, const X* x) {
    sum.at = _mm512_fmadd_ps(widen(load_half(weights)), _mm512_loadu_ps(x), sum.at);
    return sum;
  }
  struct PairSum {
    __m512 rows[2];
  };
  static inline PairSum multiply_pair(PairSum sums, const Floats& weights, const X* x) {  // two rows of 16 weights
    const __m512 inputs = _mm512_loadu_ps(x);
    for (int i = 0; i < 2; ++i) sums.rows[i] = _mm512_fmadd_ps(weights.at[i], inputs, sums.rows[i]);
    return sums;
  }
  static inline void sum_pair(const PairSum& sums, float& upper, float& lower) {
    upper = _mm512_reduce_add_ps(sums.rows[0]);
    lower = _mm512_reduce_add_ps(sums.rows[1]);
  }
  static inline Sum add(const Sum& a, const Sum& b) { return {_mm512_add_ps(a.at, b.at)}; }
  static inline float sum(const Sum& sum) { return _mm512_reduce_add_ps(sum.at); }

  static inline Bytes load_bytes(const int8_t* from) {
    const auto* at = reinterpret_cast<const __m256i*>(from);
    return {{_mm512_cvtepi8_epi16(_mm256_loadu_si256(at)), _mm512_cvtepi8_epi16(_mm256_loadu_si256(at + 1))}};
  }
  static inline __m256i expand_sixteen(uint32_t mask, __m128i kept) {  // -> 16 weights of 16 bits
    return _mm512_cvtepi32_epi16(_mm512_maskz_expand_epi32(__mmask16(mask), _mm512_cvtepi8_epi32(kept)));
  }
  static inline __m512i join(__m256i low, __m256i high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  static inline Bytes expand_bytes(uint64_t mask, const int8_t* from) {
    __m256i parts[4];
    for (int i = 0; i < 4; ++i) {
      const uint32_t sixteen = mask >> 16 * i & 0xffff;
      parts[i] = expand_sixteen(sixteen, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
      from += __builtin_popcount(sixteen);
    }
    return {{join(parts[0], parts[1]), join(parts[2], parts[3])}};
  }
  static inline Bytes expand_half_bytes(uint64_t mask, const int8_t* from) {
    __m256i parts[4];
    for (int i = 0; i < 4; ++i) {
      const __m128i kept = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8 * i));
      parts[i] = expand_sixteen(mask >> 16 * i & 0xffff, kept);
    }
    return {{join(parts[0], parts[1]), join(parts[2], parts[3])}};
  }
  static inline void store_bytes(const Bytes& values, int8_t* to) {
    for (int i = 0; i < 2; ++i)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32 * i), _mm512_cvtepi16_epi8(values.at[i]));
  }
  static inline Total multiply(Total total, const Bytes& weights, const Q* x) {
    for (int i = 0; i < 2; ++i)
      total.at = _mm512_add_epi32(total.at, _mm512_madd_epi16(weights.at[i], _mm512_loadu_si512(x + 32 * i)));
    return total;
  }
  static inline int64_t total(const Total& total) {
    alignas(64) int32_t parts[16];
    _mm512_store_si512(parts, total.at);
    int64_t out = 0;
    for (int32_t part : parts) out += part;
    return out;
  }

  template <int Count, int Tokens>
  static inline void add_floats(const uint16_t* const* channels, int64_t row, const float (&x)[Count][Tokens],
                                float* sums, int64_t width) {
    add_widened<Count, Tokens>(channels, row, x, sums, width);
  }
  template <int Fours, int Tokens>
  static inline void add_bytes(const int8_t* const* channels, int64_t row, const int32_t (&x)[Fours][Tokens],
                               int32_t* sums, int64_t width) {
    // the weight's size times the input with the weight's sign: 2 * 127 * 127 fits int16
    add_bytes_by(channels, row, x, sums, width, [](__m512i sum, __m512i weights, __m512i inputs) {
      const __m512i turned =
          _mm512_mask_sub_epi8(inputs, _mm512_movepi8_mask(weights), _mm512_setzero_si512(), inputs);
      const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(weights), turned);
      return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
    });
  }
};

}  // namespace

const sparity::Kernels sparity::avx512_kernels = kernels<Avx512>();
const sparity::DecodeKernels sparity::avx512_decode = decode_kernels();
const sparity::AttentionKernels sparity::avx512_attention = attention_kernels<Attention512>();
const sparity::BlockKernels sparity::avx512_blocks = block_kernels<FloatPanels<Blocks512>>();
