// What an instruction set provides for the operations between products, and which of them runs.
#pragma once

#include "sparity_kernels.h"

namespace sparity {

struct DecodeKernels {
  void (*rms_norm)(uint16_t* x, const uint16_t* add, const uint16_t* weight, float epsilon, int64_t columns,
                   uint16_t* out);
  void (*silu)(const uint16_t* gates, int64_t count, uint16_t* out);
  void (*gate)(const uint16_t* gates, const uint16_t* ups, int64_t count, uint16_t* out);
  // One token; `keys` has room for its columns where the rule is top or statistical.
  void (*skip)(const SparitySkip& skip, const uint16_t* x, bool whole, int64_t columns, uint32_t* keys, uint16_t* out);
  // Writes a new token's key and value, of one head, as number `at` of its row's.
  void (*append)(const SparityAttention& a, const uint16_t* k, const uint16_t* v, int64_t row, int64_t token,
                 int64_t head, int64_t at);
  // A token's attention with all query heads that read one key and value head, over its row's first `length` keys.
  void (*attend)(const SparityAttention& a, const uint16_t* q, uint16_t* out, int64_t row, int64_t token, int64_t head,
                 int64_t length);
};

extern const DecodeKernels scalar_decode;
#if defined(__x86_64__)
extern const DecodeKernels avx2_decode;
extern const DecodeKernels avx512_decode;
#endif

// Which vectors the instruction set in use has, for kernels that do not differ further.
enum Vectors { kScalar, kAvx2, kAvx512, kAvx512Bf16, kNeon, kAllVectors };
Vectors vectors_in_use();

}  // namespace sparity
