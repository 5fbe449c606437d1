// Sixteen rows side by side with dot products of bytes. Included by isa_avx512_bf16.cpp inside its namespace.

struct Rows512 : PairedSums<Rows512> {
  struct Zeros {
    __m512i at, above;  // of each row in four bytes; sixteen times as much
  };
  struct Total {
    __m512i low, high;  // of even columns; sixteen times that of odd ones
  };
  using Sum = __m512;

  static inline Zeros zeros(const uint8_t* from) {
    const __m512i each = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    const __m512i at = _mm512_mullo_epi32(each, _mm512_set1_epi32(0x01010101));
    return {at, _mm512_slli_epi32(at, 4)};
  }

  // `shift` is minus 8 times the sum of a group's inputs.
  template <bool WithZeros>
  static inline Total start(const Zeros& zeros, int32_t shift) {
    if (!WithZeros) return {_mm512_set1_epi32(shift), _mm512_setzero_si512()};
    const __m512i each = _mm512_and_si512(zeros.at, _mm512_set1_epi32(255));
    return {_mm512_madd_epi16(each, _mm512_set1_epi32(shift / 8 & 0xffff)), _mm512_setzero_si512()};
  }

  static inline __m512i masked(__m512i codes, int bit, int all) {  // (codes ^ bit) & all
    return _mm512_ternarylogic_epi32(codes, _mm512_set1_epi8(char(bit)), _mm512_set1_epi8(char(all)), 0x28);
  }

  template <bool WithZeros, int Tokens>
  static inline void add(Total* totals, const uint8_t* codes, const Zeros& zeros, const int8_t* x, int64_t stride) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i both = _mm512_loadu_si512(codes + 64 * i);
      const __m512i low = WithZeros ? _mm512_and_si512(_mm512_add_epi8(both, zeros.at), _mm512_set1_epi8(15))
                                    : masked(both, 8, 15);
      const __m512i high = WithZeros ? _mm512_and_si512(_mm512_add_epi8(both, zeros.above), _mm512_set1_epi8(char(240)))
                                     : masked(both, 128, 240);
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) {
        int32_t even, odd;
        memcpy(&even, x + t * stride + 8 * i, 4);
        memcpy(&odd, x + t * stride + 8 * i + 4, 4);
        totals[t].low = _mm512_dpbusd_epi32(totals[t].low, low, _mm512_set1_epi32(even));
        totals[t].high = _mm512_dpbusd_epi32(totals[t].high, high, _mm512_set1_epi32(odd));
      }
    }
  }

  static inline void plus(Total& total, __m256i sums) {
    total.low = _mm512_add_epi32(total.low, _mm512_cvtepi16_epi32(sums));
  }

  static inline __m512 scales(const SparityMatrix& weight, int64_t at) {
    if (weight.scale_type == SPARITY_FLOAT32) return _mm512_loadu_ps(static_cast<const float*>(weight.group_scales) + at);
    const auto* from = static_cast<const uint16_t*>(weight.group_scales) + at;
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    if (weight.scale_type == SPARITY_FLOAT16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }

  static inline Sum finish(Sum sum, const Total& total, __m512 own, float theirs) {
    const __m512i whole = _mm512_add_epi32(total.low, _mm512_srai_epi32(total.high, 4));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), _mm512_mul_ps(own, _mm512_set1_ps(theirs)), sum);
  }

  static inline void store(Sum sum, float* to) { _mm512_storeu_ps(to, sum); }
};
