// The C interface of the operations between products: how their work is split over threads.
#include "decode_kernels.h"

namespace {

const sparity::DecodeKernels& kernels() {
#if defined(__x86_64__)
  const int rank = sparity::rank_in_use();
  if (rank >= 2) return sparity::avx512_decode;
  if (rank == 1) return sparity::avx2_decode;
#endif
  return sparity::scalar_decode;
}

constexpr int64_t kAlone = 1 << 14;  // numbers that one thread works through sooner than others wake

}  // namespace

extern "C" {

void sparity_rms_norm(uint16_t* x, const uint16_t* add, const uint16_t* weight, float epsilon, int64_t tokens,
                      int64_t columns, uint16_t* out, int threads) {
  const sparity::DecodeKernels& isa = kernels();
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * columns > kAlone)
  for (int64_t token = 0; token < tokens; ++token)
    isa.rms_norm(x + token * columns, add ? add + token * columns : nullptr, weight, epsilon, columns,
                 out + token * columns);
}

void sparity_gate(const uint16_t* gates, const uint16_t* ups, int64_t count, uint16_t* out, int threads) {
  const sparity::DecodeKernels& isa = kernels();
  constexpr int64_t kShare = 4096;
#pragma omp parallel for schedule(static) num_threads(threads) if (count > kAlone)
  for (int64_t at = 0; at < count; at += kShare)
    isa.gate(gates + at, ups + at, count - at < kShare ? count - at : kShare, out + at);
}

void sparity_attend(const SparityAttention* attention, const uint16_t* q, const uint16_t* k, const uint16_t* v,
                    uint16_t* out, int threads) {
  const sparity::DecodeKernels& isa = kernels();
  const SparityAttention& a = *attention;
  const int64_t tasks = a.tokens * a.kv_heads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (tasks * a.length * a.width > kAlone)
  for (int64_t task = 0; task < tasks; ++task) isa.attend(a, q, k, v, out, task / a.kv_heads, task % a.kv_heads);
}

}  // extern "C"
