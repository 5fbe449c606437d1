// The float32 sums of sixteen rows side by side in two 256-bit vectors. Included inside the namespaces of instruction sets.

struct RowSums256 {
  struct Sum {
    __m256 at[2];
  };

  static inline Sum scales(const SparityMatrix& weight, int64_t at) {
    Sum out;
    for (int i = 0; i < 2; ++i, at += 8) {
      if (weight.scale_type == SPARITY_FLOAT32) {
        out.at[i] = _mm256_loadu_ps(static_cast<const float*>(weight.group_scales) + at);
        continue;
      }
      const auto* from = static_cast<const uint16_t*>(weight.group_scales) + at;
      if (weight.scale_type == SPARITY_FLOAT16) {
        float eight[8];
        for (int j = 0; j < 8; ++j) eight[j] = half_to_float(from[j]);
        out.at[i] = _mm256_loadu_ps(eight);
      } else {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        out.at[i] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
      }
    }
    return out;
  }

  // Adds a group's whole numbers, times the rows' scales and that of the inputs.
  static inline void add_group(Sum& sum, const __m256i (&whole)[2], const Sum& own, float theirs) {
    for (int i = 0; i < 2; ++i)
      sum.at[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole[i]), _mm256_mul_ps(own.at[i], _mm256_set1_ps(theirs)),
                                  sum.at[i]);
  }

  static inline void store(const Sum& sum, float* to) {
    for (int i = 0; i < 2; ++i) _mm256_storeu_ps(to + 8 * i, sum.at[i]);
  }
};
