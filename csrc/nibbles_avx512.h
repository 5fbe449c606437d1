// int4 with AVX-512 VNNI (dot products of bytes), VBMI (half bytes taken apart) and VBMI2 (values spread by mask). Included
// by isa_avx512_bf16.cpp inside its namespace.

// Bytes 4i to 4i + 7 in each eight bytes, and of these every half byte from the first or from the second on.
struct HalfBytes {
  alignas(64) uint8_t places[64];
  alignas(64) uint8_t shifts[2][64];
  constexpr HalfBytes() : places(), shifts() {
    for (int i = 0; i < 64; ++i) {
      places[i] = uint8_t(i / 8 * 4 + i % 8);
      for (int odd = 0; odd < 2; ++odd) shifts[odd][i] = uint8_t(4 * (i % 8) + 4 * odd);
    }
  }
};
constexpr HalfBytes kHalfBytes;

struct Fours512 {
  struct Codes {
    __m512i at;
  };
  struct Sum {
    __m512 at;
  };

  static inline Codes spread(uint64_t mask, const uint8_t* from, uint64_t odd) {
    const __m512i bytes = _mm512_permutexvar_epi8(_mm512_load_si512(kHalfBytes.places), _mm512_loadu_si512(from));
    const __m512i halves = _mm512_multishift_epi64_epi8(_mm512_load_si512(kHalfBytes.shifts[odd]), bytes);
    return {expand_all_bytes(mask, halves)};  // upper halves of bytes are those of neighbours
  }
  static inline void store(const Codes& codes, uint8_t* to) {
    _mm512_storeu_si512(to, _mm512_and_si512(codes.at, _mm512_set1_epi8(15)));
  }

  static inline __m512i lower(__m512i codes) {  // (code ^ 8) & 15, which is code + 8
    return _mm512_ternarylogic_epi32(codes, _mm512_set1_epi8(8), _mm512_set1_epi8(15), 0x28);
  }
  static inline __m512i with_zeros(__m512i codes, __m512i zeros) {
    const __m512i whole = _mm512_and_si512(_mm512_add_epi8(codes, zeros), _mm512_set1_epi8(15));
    return _mm512_add_epi8(whole, _mm512_sub_epi8(_mm512_set1_epi8(16), zeros));
  }

  // The zero points, or scales, of the `Groups` groups in a step: 1, 2 or 4 of them fill its 512 bits.
  template <int Groups>
  static inline __m512i zeros_of(const uint8_t* zeros) {
    constexpr int64_t one = 0x0101010101010101;
    if (Groups == 1) return _mm512_set1_epi8(char(*zeros));
    int32_t four;
    memcpy(&four, zeros, 4);
    const __m512i places = Groups == 2 ? _mm512_set_epi64(one, one, one, one, 0, 0, 0, 0)
                                       : _mm512_set_epi64(3 * one, 3 * one, 2 * one, 2 * one, one, one, 0, 0);
    return _mm512_shuffle_epi8(_mm512_set1_epi32(four), places);
  }
  template <int Groups>
  static inline __m512 scales_of(const float* scales) {
    if (Groups == 1) return _mm512_set1_ps(*scales);
    const __m512i places = Groups == 2 ? _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0)
                                       : _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(scales)), places);
  }

  template <bool Zeros, int Groups>
  static inline Codes ready(const Codes& codes, const uint8_t* zeros) {
    return {Zeros ? with_zeros(codes.at, zeros_of<Groups>(zeros)) : lower(codes.at)};
  }
  using Total = __m512i;

  template <bool Zeros>
  static inline __m512i start(const int32_t* shifts) {
    const __m512i eight = _mm512_loadu_si512(shifts);
    return Zeros ? _mm512_add_epi32(eight, eight) : eight;
  }
  static inline __m512i add(__m512i total, const Codes& codes, const int8_t* x) {
    return _mm512_dpbusd_epi32(total, codes.at, _mm512_loadu_si512(x));
  }
  template <int Groups>
  static inline Sum finish(Sum sum, __m512i total, const float* scales) {
    return {_mm512_fmadd_ps(_mm512_cvtepi32_ps(total), scales_of<Groups>(scales), sum.at)};
  }
  static inline float sum(const Sum& sum) { return _mm512_reduce_add_ps(sum.at); }
};
