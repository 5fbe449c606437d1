// int4 with 256-bit vectors. Included after dots_256.h by instruction sets, inside their namespaces.

struct Fours256 {
  struct Codes {
    __m256i at[2];
  };
  struct Sum {
    __m256 at;
  };

  static inline __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
  static inline __m256i fifteen() { return _mm256_set1_epi8(15); }

  // 64 half bytes from the first or the second on, one in a byte each.
  static inline void take_apart(const uint8_t* from, uint64_t odd, uint8_t* to) {
    const __m128i first = _mm_cvtsi64_si128(int64_t(4 * odd)), second = _mm_cvtsi64_si128(int64_t(4 - 4 * odd));
    const __m256i even = _mm256_and_si256(_mm256_srl_epi16(load(from), first), fifteen());
    const __m256i next = _mm256_and_si256(_mm256_srl_epi16(load(from + odd), second), fifteen());
    const __m256i low = _mm256_unpacklo_epi8(even, next), high = _mm256_unpackhi_epi8(even, next);
    auto* out = reinterpret_cast<__m256i*>(to);
    _mm256_storeu_si256(out, _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(low, high, 0x31));
  }
  static inline __m128i eight(uint64_t mask, const uint8_t* from) {
    const __m128i kept = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return _mm_shuffle_epi8(kept, _mm_cvtsi64_si128(int64_t(kPlaces.of[mask & 255])));
  }
  static inline Codes joined(const __m128i (&eights)[8]) {
    Codes out;
    for (int i = 0; i < 2; ++i) {
      const __m128i low = _mm_unpacklo_epi64(eights[4 * i], eights[4 * i + 1]);
      out.at[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(low),
                                          _mm_unpacklo_epi64(eights[4 * i + 2], eights[4 * i + 3]), 1);
    }
    return out;
  }
  static inline Codes spread(uint64_t mask, const uint8_t* from, uint64_t odd) {
    uint8_t apart[64 + 8];
    take_apart(from, odd, apart);
    __m128i eights[8];
    const uint8_t* at = apart;
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      eights[i] = eight(mask >> 8 * i, at);
      at += __builtin_popcountll(mask >> 8 * i & 255);
    }
    return joined(eights);
  }
  static inline void store(const Codes& codes, uint8_t* to) {
    for (int i = 0; i < 2; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32 * i), codes.at[i]);
  }

  static inline __m256i lower(__m256i codes) {  // code + 8
    return _mm256_and_si256(_mm256_xor_si256(codes, _mm256_set1_epi8(8)), fifteen());
  }
  static inline __m256i with_zeros(__m256i codes, __m256i zeros) {
    const __m256i whole = _mm256_and_si256(_mm256_add_epi8(codes, zeros), fifteen());
    return _mm256_add_epi8(whole, _mm256_sub_epi8(_mm256_set1_epi8(16), zeros));
  }
  template <bool Zeros, int Groups>
  static inline Codes ready(const Codes& codes, const uint8_t* zeros) {
    Codes out;
    for (int i = 0; i < 2; ++i)
      out.at[i] =
          Zeros ? with_zeros(codes.at[i], _mm256_set1_epi8(char(zeros[Groups == 2 ? i : 0]))) : lower(codes.at[i]);
    return out;
  }
  struct Total {  // of each half of a step
    __m256i at[2];
  };

  template <bool Zeros>
  static inline Total start(const int32_t* shifts) {
    Total out = {{load(shifts), load(shifts + 8)}};
    for (__m256i& eight : out.at) eight = Zeros ? _mm256_add_epi32(eight, eight) : eight;
    return out;
  }

  static inline Total add(Total total, const Codes& codes, const int8_t* x) {
    for (int i = 0; i < 2; ++i) total.at[i] = add_bytes(total.at[i], codes.at[i], load(x + 32 * i));
    return total;
  }

  template <int Groups>
  static inline Sum finish(Sum sum, const Total& total, const float* scales) {
    if (Groups == 1) return scaled(sum, _mm256_add_epi32(total.at[0], total.at[1]), _mm256_broadcast_ss(scales));
    const Sum half = scaled(sum, total.at[0], _mm256_broadcast_ss(scales));
    return scaled(half, total.at[1], _mm256_broadcast_ss(scales + 1));
  }
  static inline Sum scaled(Sum sum, __m256i total, __m256 scale) {
    return {_mm256_fmadd_ps(_mm256_cvtepi32_ps(total), scale, sum.at)};
  }
  static inline float sum(const Sum& sum) {
    alignas(32) float parts[8];
    _mm256_store_ps(parts, sum.at);
    return ((parts[0] + parts[4]) + (parts[1] + parts[5])) + ((parts[2] + parts[6]) + (parts[3] + parts[7]));
  }
};
