// Sixteen rows side by side with dot products of bytes in 256-bit vectors, eight rows in each. Included by isa_256.h inside
// its namespace, after row_sums_256.h.

struct RowsVnni : RowSums256, PairedSums<RowsVnni> {
  struct Zeros {
    __m256i at[2], above[2];  // of each row in four bytes; sixteen times as much
  };
  struct Total {
    __m256i low[2], high[2];  // of even columns; sixteen times that of odd ones
  };

  static inline Zeros zeros(const uint8_t* from) {
    Zeros out;
    for (int i = 0; i < 2; ++i) {
      const __m256i each = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8 * i)));
      out.at[i] = _mm256_mullo_epi32(each, _mm256_set1_epi32(0x01010101));
      out.above[i] = _mm256_slli_epi32(out.at[i], 4);
    }
    return out;
  }

  // `shift` is minus 8 times the sum of a group's inputs.
  template <bool WithZeros>
  static inline Total start(const Zeros& zeros, int32_t shift) {
    Total out = {};
    for (int i = 0; i < 2; ++i)
      out.low[i] = WithZeros ? _mm256_madd_epi16(_mm256_and_si256(zeros.at[i], _mm256_set1_epi32(255)),
                                                 _mm256_set1_epi32(shift / 8 & 0xffff))
                             : _mm256_set1_epi32(shift);
    return out;
  }

  template <bool WithZeros, int Tokens>
  static inline void add(Total* totals, const uint8_t* codes, const Zeros& zeros, const int8_t* x, int64_t stride) {
    const __m256i lower = _mm256_set1_epi8(15), upper = _mm256_set1_epi8(char(240)), eights = _mm256_set1_epi8(char(0x88));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m256i both = load(codes + 64 * i + 32 * half), turned = _mm256_xor_si256(both, eights);
        const __m256i low = _mm256_and_si256(WithZeros ? _mm256_add_epi8(both, zeros.at[half]) : turned, lower);
        const __m256i high = _mm256_and_si256(WithZeros ? _mm256_add_epi8(both, zeros.above[half]) : turned, upper);
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) {
          int32_t even, odd;
          memcpy(&even, x + t * stride + 8 * i, 4);
          memcpy(&odd, x + t * stride + 8 * i + 4, 4);
          totals[t].low[half] = add_bytes(totals[t].low[half], low, _mm256_set1_epi32(even));
          totals[t].high[half] = add_bytes(totals[t].high[half], high, _mm256_set1_epi32(odd));
        }
      }
    }
  }

  static inline void plus(Total& total, __m256i sums) {
    total.low[0] = _mm256_add_epi32(total.low[0], _mm256_cvtepi16_epi32(_mm256_castsi256_si128(sums)));
    total.low[1] = _mm256_add_epi32(total.low[1], _mm256_cvtepi16_epi32(_mm256_extracti128_si256(sums, 1)));
  }

  static inline Sum finish(Sum sum, const Total& total, const Sum& own, float theirs) {
    __m256i whole[2];
    for (int i = 0; i < 2; ++i) whole[i] = _mm256_add_epi32(total.low[i], _mm256_srai_epi32(total.high[i], 4));
    add_group(sum, whole, own, theirs);
    return sum;
  }
};
