// Every kernel with 256-bit vectors: kept values are spread by table look-up, eight at a time. Included once by each of the
// instruction sets that have AVX2 and FMA and no wider vectors.
#pragma once

#include <immintrin.h>

#include "gemv.h"
#include "places.h"

namespace {

inline __m256 widen(__m128i bits) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)); }

// Eight places of bytes -> sixteen of 2-byte values: p becomes 2p and 2p + 1, and 0x80 stays above 0x7f.
inline __m128i double_places(uint64_t places) {
  const __m128i p = _mm_cvtsi64_si128(int64_t(places));
  const __m128i twice = _mm_or_si128(_mm_add_epi8(p, p), _mm_and_si128(p, _mm_set1_epi8(char(0x80))));
  return _mm_unpacklo_epi8(twice, _mm_or_si128(twice, _mm_set1_epi8(1)));
}

#include "dots_256.h"

#include "columns_avx2.h"
#include "columns_fours_avx2.h"
#include "nibbles_avx2.h"
#include "pairs_avx2.h"
#include "row_sums_256.h"
#include "rows_avx2.h"
#include "rows_avx_vnni.h"

struct Isa256 : Columns256 {
  using Fours = Fours256;
  using Rows = std::conditional_t<kDotsOfBytes, RowsVnni, Rows256>;
  using ColumnFours = ColumnFours256;
  using X = float;
  using Q = int16_t;
  static constexpr int kShift = 0, kWeightShift = 0;

  struct Floats {
    __m256 at[4];
  };
  struct Sum {
    __m256 at;
  };
  struct Bytes {
    __m256i at[4];  // 16 weights each, widened
  };
  struct Total {
    __m256i at;
  };

  static X input(uint16_t bits) { return to_float(bits); }
  static float output(X x) { return x; }

  static inline Floats load_floats(const uint16_t* from) {
    Floats out;
    for (int i = 0; i < 4; ++i) out.at[i] = widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 8 * i)));
    return out;
  }
  static inline Floats expand_floats(uint32_t mask, const uint16_t* from) {
    Floats out;
    for (int i = 0; i < 4; ++i) {
      const uint32_t eight = mask >> 8 * i & 255;
      const __m128i kept = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      out.at[i] = widen(_mm_shuffle_epi8(kept, double_places(kPlaces.of[eight])));
      from += __builtin_popcount(eight);
    }
    return out;
  }
  static inline Floats expand_half_floats(uint32_t mask, const uint16_t* from) {
    const __m256i kept = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    Floats out;
    for (int i = 0; i < 4; ++i) {  // four values for each eight weights
      const __m128i half = i < 2 ? _mm256_castsi256_si128(kept) : _mm256_extracti128_si256(kept, 1);
      const __m128i four = i % 2 ? _mm_srli_si128(half, 8) : half;
      out.at[i] = widen(_mm_shuffle_epi8(four, double_places(kPlaces.of[mask >> 8 * i & 255])));
    }
    return out;
  }
  static inline void store_floats(const Floats& values, uint16_t* to) {
    for (int i = 0; i < 4; ++i) {
      const __m256i words = _mm256_srli_epi32(_mm256_castps_si256(values.at[i]), 16);
      const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8 * i), packed);
    }
  }
  static inline Sum multiply(Sum sum, const Floats& weights, const X* x) {
    for (int i = 0; i < 4; ++i) sum.at = _mm256_fmadd_ps(weights.at[i], _mm256_loadu_ps(x + 8 * i), sum.at);
    return sum;
  }
  static inline Sum multiply_half(Sum sum, const uint16_t* weights, const X* x) {
    for (int i = 0; i < 2; ++i) {
      const __m256 eight = widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weights + 8 * i)));
      sum.at = _mm256_fmadd_ps(eight, _mm256_loadu_ps(x + 8 * i), sum.at);
    }
    return sum;
  }
  struct PairSum {
    Sum rows[2];
  };
  static inline PairSum multiply_pair(PairSum sums, const Floats& weights, const X* x) {  // two rows of 16 weights
    for (int i = 0; i < 4; ++i)
      sums.rows[i / 2].at = _mm256_fmadd_ps(weights.at[i], _mm256_loadu_ps(x + 8 * (i % 2)), sums.rows[i / 2].at);
    return sums;
  }
  static inline void sum_pair(const PairSum& sums, float& upper, float& lower) {
    upper = sum(sums.rows[0]);
    lower = sum(sums.rows[1]);
  }
  static inline Sum add(const Sum& a, const Sum& b) { return {_mm256_add_ps(a.at, b.at)}; }
  static inline float sum(const Sum& sum) {
    alignas(32) float parts[8];
    _mm256_store_ps(parts, sum.at);
    return ((parts[0] + parts[4]) + (parts[1] + parts[5])) + ((parts[2] + parts[6]) + (parts[3] + parts[7]));
  }

  static inline Bytes load_bytes(const int8_t* from) {
    Bytes out;
    for (int i = 0; i < 4; ++i)
      out.at[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16 * i)));
    return out;
  }
  static inline __m128i expand_eight(uint32_t mask, const int8_t* from) {
    return _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)),
                            _mm_cvtsi64_si128(int64_t(kPlaces.of[mask])));
  }
  static inline Bytes expand_bytes(uint64_t mask, const int8_t* from) {
    Bytes out;
    for (int i = 0; i < 4; ++i) {
      const uint32_t first = mask >> 16 * i & 255, second = mask >> (16 * i + 8) & 255;
      const __m128i low = expand_eight(first, from);
      from += __builtin_popcount(first);
      const __m128i high = expand_eight(second, from);
      from += __builtin_popcount(second);
      out.at[i] = _mm256_cvtepi8_epi16(_mm_unpacklo_epi64(low, high));
    }
    return out;
  }
  static inline Bytes expand_half_bytes(uint64_t mask, const int8_t* from) {
    Bytes out;
    for (int i = 0; i < 4; ++i) {
      const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8 * i));
      const __m128i low = _mm_shuffle_epi8(eight, _mm_cvtsi64_si128(int64_t(kPlaces.of[mask >> 16 * i & 255])));
      const __m128i high = _mm_shuffle_epi8(_mm_srli_si128(eight, 4),
                                            _mm_cvtsi64_si128(int64_t(kPlaces.of[mask >> (16 * i + 8) & 255])));
      out.at[i] = _mm256_cvtepi8_epi16(_mm_unpacklo_epi64(low, high));
    }
    return out;
  }
  static inline void store_bytes(const Bytes& values, int8_t* to) {
    for (int i = 0; i < 4; ++i) {
      const __m128i packed =
          _mm_packs_epi16(_mm256_castsi256_si128(values.at[i]), _mm256_extracti128_si256(values.at[i], 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16 * i), packed);
    }
  }
  static inline Total multiply(Total total, const Bytes& weights, const Q* x) {
    for (int i = 0; i < 4; ++i) {
      const __m256i inputs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 16 * i));
      total.at = add_words_apart(total.at, weights.at[i], inputs);
    }
    return total;
  }
  static inline int64_t total(const Total& total) {
    alignas(32) int32_t parts[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(parts), total.at);
    int64_t out = 0;
    for (int32_t part : parts) out += part;
    return out;
  }
};

#include "avx2_tables.h"
#include "avx2_tiles.h"

// Always two rows at a time: the sums of one alone wait for each other longer than memory takes.
void dense_tiles(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t tokens, int64_t begin,
                 int64_t end) {
  const int64_t last = end * kTileRows < weight.rows ? end * kTileRows : weight.rows;
  int64_t row = begin * kTileRows;
  for (; row + 2 <= last; row += 2) dense_all_tokens<Isa256, 2>(weight, in, out, tokens, row, far_ahead(weight));
  if (row < last) dense_all_tokens<Isa256, 1>(weight, in, out, tokens, row, far_ahead(weight));
}

void gemv_256(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t tokens, int64_t begin,
              int64_t end) {
  if (weight.group && weight.format != SPARITY_COLUMNS)
    fours<Isa256>(weight, in, out, tokens, begin, end);
  else if (weight.format == SPARITY_BITMASK)
    spread_tiles<MaskedRows>(weight, in, out, tokens, begin, end);
  else if (weight.format == SPARITY_TWO_OF_FOUR)
    spread_tiles<PairedRows>(weight, in, out, tokens, begin, end);
  else if (weight.format == SPARITY_DENSE && !weight.scales)
    dense_tiles(weight, in, out, tokens, begin, end);
  else
    gemv<Isa256>(weight, in, out, tokens, begin, end);
}

constexpr sparity::Kernels kernels_256() {
  sparity::Kernels all = kernels<Isa256>();
  all.gemv = gemv_256;
  return all;
}

}  // namespace
