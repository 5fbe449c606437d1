// The C interface of the operations between products: how their work is split over threads.
#include <stdlib.h>

#include <memory>

#include "decode_kernels.h"
#include "numbers.h"

namespace {

const sparity::DecodeKernels& kernels() {
#if defined(__x86_64__)
  const sparity::Vectors vectors = sparity::vectors_in_use();
  if (vectors == sparity::kAvx2) return sparity::avx2_decode;
  if (vectors != sparity::kScalar) return sparity::avx512_decode;
#endif
  return sparity::scalar_decode;
}

constexpr int64_t kMostTokens = 16;  // inputs that a product takes at a time

struct Product {
  const SparityMatrix* weight;
  const uint16_t* bias;
  const SparitySkip* skip;
  const float* shift;
  uint16_t* out;  // [tokens, rows]
};

// Inputs of products that read x [tokens, columns], each without the channels that its skip leaves out; `room` has space
// for Count such inputs.
template <int Count>
int mask(const Product (&products)[Count], const uint16_t* x, const uint8_t* whole, int64_t tokens, uint16_t* room,
         const uint16_t* (&inputs)[Count], int threads) {
  const int64_t columns = products[0].weight->columns;
  for (int i = 0; i < Count; ++i) {
    inputs[i] = x;
    for (int j = 0; j < i; ++j)
      if (products[j].skip == products[i].skip) inputs[i] = inputs[j];
    if (!products[i].skip || inputs[i] != x) continue;
    uint16_t* masked = room + i * tokens * columns;
    if (sparity_skip(products[i].skip, x, whole, tokens, columns, masked, threads)) return SPARITY_UNSUPPORTED;
    inputs[i] = masked;
  }
  return SPARITY_OK;
}

void add_bias(const Product& product, const uint8_t* whole, int64_t tokens) {
  const int64_t rows = product.weight->rows;
  for (int64_t token = 0; token < tokens; ++token) {
    const float* shift = whole && whole[token] ? nullptr : product.shift;
    uint16_t* out = product.out + token * rows;
    for (int64_t row = 0; (shift || product.bias) && row < rows; ++row)
      out[row] = to_bfloat16(to_float(out[row]) + (shift ? shift[row] : 0.0f) +
                             (product.bias ? to_float(product.bias[row]) : 0.0f));
  }
}

template <int Count>
int multiply(const Product (&products)[Count], const uint16_t* x, const uint8_t* whole, int64_t tokens, uint16_t* room,
             int threads) {
  const SparityMatrix* weights[Count];
  const uint16_t *inputs[Count], *xs[Count];
  void* outs[Count];
  if (mask(products, x, whole, tokens, room, inputs, threads)) return SPARITY_UNSUPPORTED;
  for (int64_t token = 0; token < tokens; token += kMostTokens) {
    for (int i = 0; i < Count; ++i) {
      weights[i] = products[i].weight;
      xs[i] = inputs[i] + token * weights[i]->columns;
      outs[i] = products[i].out + token * weights[i]->rows;
    }
    const int64_t now = tokens - token < kMostTokens ? tokens - token : kMostTokens;
    const int status = sparity_gemv_many(weights, Count, xs, outs, 0, now, threads);
    if (status) return status;
  }
  for (const Product& product : products) add_bias(product, whole, tokens);
  return SPARITY_OK;
}

// The product's rows where some token's `wanted` [tokens, rows] is not 0; its other results are 0.
int multiply_wanted(const Product& product, const uint16_t* wanted, const uint16_t* x, const uint8_t* whole,
                    int64_t tokens, uint16_t* room, int threads) {
  const int64_t rows = product.weight->rows, columns = product.weight->columns;
  if (product.weight->format != SPARITY_DENSE) return multiply<1>({product}, x, whole, tokens, room, threads);
  const uint16_t* inputs[1];
  const std::unique_ptr<char, void (*)(void*)> memory(static_cast<char*>(malloc(size_t(rows) * 4)), free);
  if (!memory || mask<1>({product}, x, whole, tokens, room, inputs, threads)) return SPARITY_UNSUPPORTED;
  auto* listed = reinterpret_cast<int32_t*>(memory.get());
  memset(product.out, 0, size_t(tokens * rows) * 2);
  for (int64_t token = 0; token < tokens; token += kMostTokens) {
    const int64_t now = tokens - token < kMostTokens ? tokens - token : kMostTokens;
    int64_t count = 0;
    for (int64_t row = 0; row < rows; ++row) {
      uint16_t any = 0;
      for (int64_t t = token; t < token + now; ++t) any |= wanted[t * rows + row] & 0x7fff;
      listed[count] = int32_t(row);
      count += any != 0;
    }
    if (sparity_gemv_rows(product.weight, listed, count, inputs[0] + token * columns, product.out + token * rows, 0, now,
                          threads))
      return SPARITY_UNSUPPORTED;
  }
  add_bias(product, whole, tokens);
  return SPARITY_OK;
}

// wanted *= ups, where wanted is not 0.
void multiply_up(uint16_t* wanted, const uint16_t* ups, int64_t count) {
  for (int64_t at = 0; at < count; ++at)
    wanted[at] = wanted[at] & 0x7fff ? to_bfloat16(to_float(wanted[at]) * to_float(ups[at])) : uint16_t(0);
}

constexpr int64_t kAlone = 1 << 14;  // numbers that one thread works through sooner than others wake

// The new tokens of one row: the first of them, and how many.
struct Fresh {
  int64_t first, count;
};

Fresh fresh_of(const SparityAttention& a, int64_t row) {
  if (!a.fresh) return {row, 1};
  int64_t first = 0;
  for (int64_t before = 0; before < row; ++before) first += a.fresh[before];
  return {first, a.fresh[row]};
}

// One task for each row and head: a row's tokens one after another, as they must be where they add to the same mass.
void attend_by_row(const sparity::DecodeKernels& isa, const SparityAttention& a, const uint16_t* q, const uint16_t* k,
                   const uint16_t* v, uint16_t* out, int threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t task = 0; task < a.rows * a.kv_heads; ++task) {
    const int64_t row = task / a.kv_heads, head = task % a.kv_heads, length = a.cache.lengths[task];
    const Fresh fresh = fresh_of(a, row);
    for (int64_t i = 0; i < fresh.count; ++i) {
      isa.append(a, k, v, row, fresh.first + i, head, length + i);
      isa.attend(a, q, out, row, fresh.first + i, head, length + i + 1);
    }
  }
}

// One task for each token and head, once all are in the cache; the last tokens, which have most to do, come first.
void attend_by_token(const sparity::DecodeKernels& isa, const SparityAttention& a, const uint16_t* q, const uint16_t* k,
                     const uint16_t* v, uint16_t* out, int threads) {
  int64_t most = 0;
  for (int64_t row = 0; row < a.rows; ++row) most = a.fresh[row] > most ? a.fresh[row] : most;
  const int64_t pairs = a.rows * a.kv_heads;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < pairs; ++task) {
      const Fresh fresh = fresh_of(a, task / a.kv_heads);
      for (int64_t i = 0; i < fresh.count; ++i)
        isa.append(a, k, v, task / a.kv_heads, fresh.first + i, task % a.kv_heads, a.cache.lengths[task] + i);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < pairs * most; ++task) {
      const int64_t pair = task % pairs, i = most - 1 - task / pairs;
      const Fresh fresh = fresh_of(a, pair / a.kv_heads);
      if (i < fresh.count)
        isa.attend(a, q, out, pair / a.kv_heads, fresh.first + i, pair % a.kv_heads, a.cache.lengths[pair] + i + 1);
    }
  }
}

// Numbers that the keys hold which all tokens read, about.
int64_t work_of(const SparityAttention& a) {
  int64_t keys = 0;
  for (int64_t pair = 0; pair < a.rows * a.kv_heads; ++pair)
    keys += (a.fresh ? a.fresh[pair / a.kv_heads] : 1) * a.cache.lengths[pair];
  return (keys + a.tokens * a.kv_heads) * a.width;
}

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

void sparity_silu(const uint16_t* gates, int64_t count, uint16_t* out, int threads) {
  const sparity::DecodeKernels& isa = kernels();
  constexpr int64_t kShare = 4096;
#pragma omp parallel for schedule(static) num_threads(threads) if (count > kAlone)
  for (int64_t at = 0; at < count; at += kShare)
    isa.silu(gates + at, count - at < kShare ? count - at : kShare, out + at);
}

int sparity_skip(const SparitySkip* skip, const uint16_t* x, const uint8_t* whole, int64_t tokens, int64_t columns,
                 uint16_t* out, int threads) {
  const sparity::DecodeKernels& isa = kernels();
  const bool ordered = skip->scale == SPARITY_SKIP_TOP || skip->scale == SPARITY_SKIP_STATISTICAL;
  const std::unique_ptr<char, void (*)(void*)> keys(
      static_cast<char*>(ordered ? malloc(size_t(tokens * columns) * 4) : nullptr), free);
  if (ordered && !keys) return SPARITY_UNSUPPORTED;
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * columns > kAlone)
  for (int64_t token = 0; token < tokens; ++token) {
    uint32_t* own = ordered ? reinterpret_cast<uint32_t*>(keys.get()) + token * columns : nullptr;
    isa.skip(*skip, x + token * columns, whole && whole[token], columns, own, out + token * columns);
  }
  return SPARITY_OK;
}

int sparity_attend(const SparityAttention* attention, const uint16_t* q, const uint16_t* k, const uint16_t* v,
                   uint16_t* out, int threads) {
  const SparityAttention& a = *attention;
  if (a.cache.type != SPARITY_CACHE_BFLOAT16) return SPARITY_UNSUPPORTED;
  const int used = work_of(a) > kAlone ? threads : 1;
  const bool apart = a.fresh && a.tokens > a.rows && !a.cache.mass && used > 1;
  (apart ? attend_by_token : attend_by_row)(kernels(), a, q, k, v, out, used);
  return SPARITY_OK;
}

int sparity_step(const SparityStep* step, const SparityBlock* blocks, int count, int threads) {
  const int64_t tokens = step->tokens, hidden = step->hidden;
  int64_t widest = 0, wide = 0;  // of heads, and of the MLP
  for (int i = 0; i < count; ++i) {
    if (blocks[i].attention.cache.type != SPARITY_CACHE_BFLOAT16) return SPARITY_UNSUPPORTED;
    const int64_t heads = blocks[i].q->rows + blocks[i].k->rows + blocks[i].v->rows + blocks[i].q->rows;
    widest = heads > widest ? heads : widest;
    wide = blocks[i].up->rows > wide ? blocks[i].up->rows : wide;
    wide = blocks[i].o->columns > wide ? blocks[i].o->columns : wide;
  }
  const int64_t masked = 3 * hidden > wide ? 3 * hidden : wide;  // inputs without what is skipped
  const size_t room = size_t(tokens) * size_t(2 * hidden + widest + 2 * wide + masked) * sizeof(uint16_t);
  const std::unique_ptr<char, void (*)(void*)> memory(static_cast<char*>(malloc(room)), free);
  if (!memory) return SPARITY_UNSUPPORTED;
  auto* normed = reinterpret_cast<uint16_t*>(memory.get());
  uint16_t *added = normed + tokens * hidden, *heads = added + tokens * hidden, *gates = heads + tokens * widest;
  uint16_t* spare = gates + 2 * tokens * wide;
  const uint8_t* whole = step->whole;
  for (int i = 0; i < count; ++i) {
    const SparityBlock& b = blocks[i];
    uint16_t *q = heads, *k = q + tokens * b.q->rows, *v = k + tokens * b.k->rows, *seen = v + tokens * b.v->rows;
    uint16_t* ups = gates + tokens * b.gate->rows;
    sparity_rms_norm(step->stream, i ? added : nullptr, b.attention_norm, b.attention_epsilon, tokens, hidden, normed,
                     threads);
    if (multiply<3>({{b.q, b.q_bias, b.q_skip, b.q_shift, q},
                     {b.k, b.k_bias, b.k_skip, b.k_shift, k},
                     {b.v, b.v_bias, b.v_skip, b.v_shift, v}},
                    normed, whole, tokens, spare, threads))
      return SPARITY_UNSUPPORTED;
    SparityAttention attention = b.attention;
    attention.rows = step->rows;
    attention.tokens = tokens;
    attention.fresh = step->fresh;
    attention.cos = step->cos;
    attention.sin = step->sin;
    attention.visible = step->visible;
    attention.visible_keys = step->visible_keys;
    if (sparity_attend(&attention, q, k, v, seen, threads)) return SPARITY_UNSUPPORTED;
    if (multiply<1>({{b.o, b.o_bias, b.o_skip, b.o_shift, added}}, seen, whole, tokens, spare, threads))
      return SPARITY_UNSUPPORTED;
    sparity_rms_norm(step->stream, added, b.mlp_norm, b.mlp_epsilon, tokens, hidden, normed, threads);
    const Product gate = {b.gate, b.gate_bias, b.gate_skip, b.gate_shift, gates};
    const Product up = {b.up, b.up_bias, b.up_skip, b.up_shift, ups};
    const int64_t neurons = tokens * b.up->rows;
    if (b.neuron_skip) {
      if (multiply<1>({gate}, normed, whole, tokens, spare, threads)) return SPARITY_UNSUPPORTED;
      sparity_silu(gates, neurons, gates, threads);
      if (sparity_skip(b.neuron_skip, gates, whole, tokens, b.up->rows, gates, threads) ||
          multiply_wanted(up, gates, normed, whole, tokens, spare, threads))
        return SPARITY_UNSUPPORTED;
      multiply_up(gates, ups, neurons);
    } else {
      if (multiply<2>({gate, up}, normed, whole, tokens, spare, threads)) return SPARITY_UNSUPPORTED;
      sparity_gate(gates, ups, neurons, gates, threads);
    }
    if (multiply<1>({{b.down, b.down_bias, b.down_skip, b.down_shift, added}}, gates, whole, tokens, spare, threads))
      return SPARITY_UNSUPPORTED;
  }
  sparity_rms_norm(step->stream, count ? added : nullptr, step->last_norm, step->last_epsilon, tokens, hidden,
                   step->out, threads);
  return SPARITY_OK;
}

}  // extern "C"
