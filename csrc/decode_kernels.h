// What an instruction set provides for the operations between products, and which of them runs.
#pragma once

#include "sparity_kernels.h"

namespace sparity {

struct DecodeKernels {
  void (*rms_norm)(uint16_t* x, const uint16_t* add, const uint16_t* weight, float epsilon, int64_t columns,
                   uint16_t* out);
  void (*gate)(const uint16_t* gates, const uint16_t* ups, int64_t count, uint16_t* out);
  void (*attend)(const SparityAttention& a, const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* out,
                 int64_t token, int64_t head);
};

extern const DecodeKernels scalar_decode;
#if defined(__x86_64__)
extern const DecodeKernels avx2_decode;
extern const DecodeKernels avx512_decode;
#endif

// The rank of the instruction set in use, see sparity_isa_use.
int rank_in_use();

}  // namespace sparity
