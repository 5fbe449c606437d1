// The C interface of Sparity's kernels. Nothing here checks its input: the caller has checked every packed matrix.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define SPARITY_EXPORT __declspec(dllexport)
#else
#define SPARITY_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { SPARITY_ABI = 4 };
enum { SPARITY_DENSE = 0, SPARITY_BITMASK = 1, SPARITY_TWO_OF_FOUR = 2, SPARITY_BLOCK = 3 };
enum { SPARITY_OK = 0, SPARITY_UNSUPPORTED = 1 };

// One weight [rows, columns], stored as docs/format.md says. Values are bfloat16, or int8 when scales is not null.
typedef struct {
  int64_t rows, columns;
  const void* values;
  const uint8_t* masks;          // bitmask, two_of_four
  const int64_t* offsets;        // bitmask: tiles + 1; block: block rows + 1
  const int32_t* block_columns;  // block: [kept]
  const float* scales;           // int8: [rows]
  int64_t block_rows, block_width;
  int64_t kept;                  // entries of values (blocks of them in the format block)
  int32_t format;
  const int32_t* row_sums;       // int8: [rows], from sparity_row_sums
} SparityMatrix;

// The number of this interface; a library of another number is not used.
SPARITY_EXPORT int sparity_abi(void);

// Instruction sets by rank, "scalar" first; null beyond the last one.
SPARITY_EXPORT const char* sparity_isa_name(int rank);
// The highest rank that this processor can run.
SPARITY_EXPORT int sparity_isa_best(void);
// Chooses the instruction set of all later calls; SPARITY_UNSUPPORTED when the processor lacks it.
SPARITY_EXPORT int sparity_isa_use(int rank);

// y[token, row] = sum over columns of weight[row, column] * x[token, column], for `tokens` >= 1.
// x: bfloat16 [tokens, columns]; y: [tokens, rows], bfloat16 or (wide) float32. Sums are float32; int8 weights meet
// inputs that are quantised per token (see reference.py). The result does not depend on `threads`.
SPARITY_EXPORT int sparity_gemv(const SparityMatrix* weight, const uint16_t* x, void* y, int wide, int64_t tokens,
                                int threads);

// The same for `count` weights of any formats that have the same columns and share the input, which is prepared once:
// ys[i] is weights[i]'s y, and equals what sparity_gemv gives.
SPARITY_EXPORT int sparity_gemv_many(const SparityMatrix* const* weights, int count, const uint16_t* x, void* const* ys,
                                     int wide, int64_t tokens, int threads);

// Rows [begin, end) of the weight as they are stored, bfloat16 or int8, into out [end - begin, columns].
// begin is a multiple of 4 (of block_rows in the format block).
SPARITY_EXPORT int sparity_unpack(const SparityMatrix* weight, int64_t begin, int64_t end, void* out, int threads);

// The sum of each row's int8 values into out [rows]; it belongs into the weight before sparity_gemv.
SPARITY_EXPORT int sparity_row_sums(const SparityMatrix* weight, int32_t* out, int threads);

// x: bfloat16 [tokens, columns] -> int8 out and its scale per token; NaN as scale marks a token that is not finite.
SPARITY_EXPORT void sparity_quantize(const uint16_t* x, int64_t tokens, int64_t columns, int8_t* out, float* scales,
                                     int threads);

// ---- between the products of one decoding step, one new token for each row of a batch; everything is bfloat16

// x[token] += add[token] (add may be null), then out[token] = weight * x[token] / rms(x[token]).
// x, add, out: [tokens, columns]; rounded where a model's modules round: the sum, the normed value and the product.
SPARITY_EXPORT void sparity_rms_norm(uint16_t* x, const uint16_t* add, const uint16_t* weight, float epsilon,
                                     int64_t tokens, int64_t columns, uint16_t* out, int threads);

// out = silu(gates) * ups, each rounded; all [count].
SPARITY_EXPORT void sparity_gate(const uint16_t* gates, const uint16_t* ups, int64_t count, uint16_t* out, int threads);

// One layer's attention. `width`, the size of a head, is a multiple of 16 and at most 512; kv_heads divides heads.
typedef struct {
  int64_t tokens, heads, kv_heads, width;
  const uint16_t *cos, *sin;                // [tokens, width]: rotary tables at each token's position
  const uint16_t *query_norm, *key_norm;    // [width], or null where heads are not normed
  uint16_t *keys, *values;                  // the cache, [tokens, kv_heads, capacity, width]
  int64_t capacity, length;                 // room for keys, and how many there are; length < capacity
  const uint8_t* visible;                   // [tokens, length + 1], 0 = not seen; null = all seen
  float scale, epsilon;
} SparityAttention;

// Norms and rotates q [tokens, heads, width] and k [tokens, kv_heads, width], appends k and v to the cache at `length`,
// and attends over the length + 1 keys: out [tokens, heads, width]. A token that sees no key gives zeros.
SPARITY_EXPORT void sparity_attend(const SparityAttention* attention, const uint16_t* q, const uint16_t* k,
                                   const uint16_t* v, uint16_t* out, int threads);

// One block: its attention and then its gated MLP. A null bias adds nothing.
typedef struct {
  const SparityMatrix *q, *k, *v, *o, *gate, *up, *down;
  const uint16_t *q_bias, *k_bias, *v_bias, *o_bias, *gate_bias, *up_bias, *down_bias;  // [rows]
  const uint16_t *attention_norm, *mlp_norm;                                            // [hidden]
  float attention_epsilon, mlp_epsilon;
  SparityAttention attention;  // all but tokens, cos, sin, length and visible, which are those of the step
} SparityBlock;

// One decoding step through all blocks and the last norm: stream [tokens, hidden] is read and written over, out is like
// it; the caches grow by one token. tokens, cos, sin, length and visible as in SparityAttention.
typedef struct {
  int64_t tokens, hidden, length;
  const uint16_t *cos, *sin;
  const uint8_t* visible;
  const uint16_t* last_norm;
  float last_epsilon;
  uint16_t *stream, *out;
} SparityStep;

SPARITY_EXPORT int sparity_step(const SparityStep* step, const SparityBlock* blocks, int count, int threads);

// Reads memory as the kernels do and gives the sum of its 64-bit words: what benchmarks measure the kernels' speed by.
SPARITY_EXPORT uint64_t sparity_read(const void* memory, int64_t bytes, int threads);

// Memory on large pages where the system has them; null when there is none. Freed with the same number of bytes.
SPARITY_EXPORT void* sparity_allocate(int64_t bytes);
SPARITY_EXPORT void sparity_free(void* memory, int64_t bytes);

#ifdef __cplusplus
}
#endif
