// Sixteen rows side by side with 256-bit vectors, eight in each. Included by instruction sets without dot products of
// bytes, inside their namespaces, after row_sums_256.h.

struct Rows256 : RowSums256, PairedSums<Rows256> {
  struct Zeros {
    __m256i at[2];  // of each row in four bytes
  };
  struct Total {
    __m256i at[2];
  };

  static inline Zeros zeros(const uint8_t* from) {
    Zeros out;
    for (int i = 0; i < 2; ++i) {
      const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8 * i));
      out.at[i] = _mm256_mullo_epi32(_mm256_cvtepu8_epi32(eight), _mm256_set1_epi32(0x01010101));
    }
    return out;
  }

  template <bool WithZeros>
  static inline Total start(const Zeros& zeros, int32_t shift) {
    if (!WithZeros) return {{_mm256_set1_epi32(shift), _mm256_set1_epi32(shift)}};
    Total out;
    for (int i = 0; i < 2; ++i) {
      const __m256i each = _mm256_and_si256(zeros.at[i], _mm256_set1_epi32(255));
      out.at[i] = _mm256_madd_epi16(each, _mm256_set1_epi32(shift / 8 & 0xffff));
    }
    return out;
  }

  template <bool WithZeros>
  static inline __m256i whole(__m256i codes, __m256i zeros) {  // code + 8, or with zero points code + zero
    const __m256i moved = WithZeros ? _mm256_add_epi8(codes, zeros) : _mm256_xor_si256(codes, _mm256_set1_epi8(8));
    return _mm256_and_si256(moved, _mm256_set1_epi8(15));
  }

  // Codes are at most 15 and inputs 127, so a lane's sixteen products of 32 columns fit int16.
  template <bool WithZeros, int Tokens>
  static inline void add(Total* totals, const uint8_t* codes, const Zeros& zeros, const int8_t* x, int64_t stride) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m256i pairs[Tokens] = {};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m256i both = load(codes + 64 * i + 32 * half);
        const __m256i low = whole<WithZeros>(both, zeros.at[half]);
        const __m256i high = whole<WithZeros>(_mm256_srli_epi16(both, 4), zeros.at[half]);
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) {
          int32_t even, odd;
          memcpy(&even, x + t * stride + 8 * i, 4);
          memcpy(&odd, x + t * stride + 8 * i + 4, 4);
          pairs[t] = _mm256_add_epi16(pairs[t], _mm256_maddubs_epi16(low, _mm256_set1_epi32(even)));
          pairs[t] = _mm256_add_epi16(pairs[t], _mm256_maddubs_epi16(high, _mm256_set1_epi32(odd)));
        }
      }
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t)
        totals[t].at[half] =
            _mm256_add_epi32(totals[t].at[half], _mm256_madd_epi16(pairs[t], _mm256_set1_epi16(1)));
    }
  }

  static inline void plus(Total& total, __m256i sums) {
    total.at[0] = _mm256_add_epi32(total.at[0], _mm256_cvtepi16_epi32(_mm256_castsi256_si128(sums)));
    total.at[1] = _mm256_add_epi32(total.at[1], _mm256_cvtepi16_epi32(_mm256_extracti128_si256(sums, 1)));
  }

  static inline Sum finish(Sum sum, const Total& total, const Sum& own, float theirs) {
    add_group(sum, total.at, own, theirs);
    return sum;
  }
};
