// The C interface of the operations between products: how their work is split over threads.
#include <stdlib.h>

#include <memory>

#include "decode_kernels.h"
#include "numbers.h"

namespace {

const sparity::DecodeKernels& kernels() {
#if defined(__x86_64__)
  const int rank = sparity::rank_in_use();
  if (rank >= 2) return sparity::avx512_decode;
  if (rank == 1) return sparity::avx2_decode;
#endif
  return sparity::scalar_decode;
}

constexpr int64_t kMostTokens = 16;  // inputs that a product takes at a time

struct Product {
  const SparityMatrix* weight;
  const uint16_t* bias;
  uint16_t* out;  // [tokens, rows]
};

// Products that read one input [tokens, columns].
template <int Count>
int multiply(const Product (&products)[Count], const uint16_t* x, int64_t tokens, int threads) {
  const SparityMatrix* weights[Count];
  void* outs[Count];
  for (int64_t token = 0; token < tokens; token += kMostTokens) {
    for (int i = 0; i < Count; ++i) {
      weights[i] = products[i].weight;
      outs[i] = products[i].out + token * products[i].weight->rows;
    }
    const int64_t now = tokens - token < kMostTokens ? tokens - token : kMostTokens;
    const int status = sparity_gemv_many(weights, Count, x + token * weights[0]->columns, outs, 0, now, threads);
    if (status) return status;
  }
  for (const Product& product : products)
    for (int64_t at = 0; product.bias && at < tokens * product.weight->rows; ++at)
      product.out[at] = to_bfloat16(to_float(product.out[at]) + to_float(product.bias[at % product.weight->rows]));
  return SPARITY_OK;
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

int sparity_step(const SparityStep* step, const SparityBlock* blocks, int count, int threads) {
  const int64_t tokens = step->tokens, hidden = step->hidden;
  int64_t widest = 0, wide = 0;  // of heads, and of the MLP
  for (int i = 0; i < count; ++i) {
    const int64_t heads = blocks[i].q->rows + blocks[i].k->rows + blocks[i].v->rows + blocks[i].q->rows;
    widest = heads > widest ? heads : widest;
    wide = blocks[i].up->rows > wide ? blocks[i].up->rows : wide;
  }
  const size_t room = size_t(tokens) * size_t(2 * hidden + widest + 2 * wide) * sizeof(uint16_t);
  const std::unique_ptr<char, void (*)(void*)> memory(static_cast<char*>(malloc(room)), free);
  if (!memory) return SPARITY_UNSUPPORTED;
  auto* normed = reinterpret_cast<uint16_t*>(memory.get());
  uint16_t *added = normed + tokens * hidden, *heads = added + tokens * hidden, *gates = heads + tokens * widest;
  for (int i = 0; i < count; ++i) {
    const SparityBlock& b = blocks[i];
    uint16_t *q = heads, *k = q + tokens * b.q->rows, *v = k + tokens * b.k->rows, *seen = v + tokens * b.v->rows;
    uint16_t* ups = gates + tokens * b.gate->rows;
    sparity_rms_norm(step->stream, i ? added : nullptr, b.attention_norm, b.attention_epsilon, tokens, hidden, normed,
                     threads);
    if (multiply<3>({{b.q, b.q_bias, q}, {b.k, b.k_bias, k}, {b.v, b.v_bias, v}}, normed, tokens, threads))
      return SPARITY_UNSUPPORTED;
    SparityAttention attention = b.attention;
    attention.tokens = tokens;
    attention.cos = step->cos;
    attention.sin = step->sin;
    attention.length = step->length;
    attention.visible = step->visible;
    sparity_attend(&attention, q, k, v, seen, threads);
    if (multiply<1>({{b.o, b.o_bias, added}}, seen, tokens, threads)) return SPARITY_UNSUPPORTED;
    sparity_rms_norm(step->stream, added, b.mlp_norm, b.mlp_epsilon, tokens, hidden, normed, threads);
    if (multiply<2>({{b.gate, b.gate_bias, gates}, {b.up, b.up_bias, ups}}, normed, tokens, threads))
      return SPARITY_UNSUPPORTED;
    sparity_gate(gates, ups, tokens * b.up->rows, gates, threads);
    if (multiply<1>({{b.down, b.down_bias, added}}, gates, tokens, threads)) return SPARITY_UNSUPPORTED;
  }
  sparity_rms_norm(step->stream, count ? added : nullptr, step->last_norm, step->last_epsilon, tokens, hidden,
                   step->out, threads);
  return SPARITY_OK;
}

}  // extern "C"
