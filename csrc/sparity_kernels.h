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

enum { SPARITY_ABI = 11 };
enum { SPARITY_DENSE = 0, SPARITY_BITMASK = 1, SPARITY_TWO_OF_FOUR = 2, SPARITY_BLOCK = 3, SPARITY_COLUMNS = 4 };
// The types of a group's scales.
enum { SPARITY_FLOAT32 = 0, SPARITY_FLOAT16 = 1, SPARITY_BFLOAT16 = 2 };
enum { SPARITY_OK = 0, SPARITY_UNSUPPORTED = 1 };

// One weight [rows, columns], stored as docs/format.md says. Values are bfloat16, int8 when scales is not null, or int4,
// two in a byte, when group is not 0.
typedef struct {
  int64_t rows, columns;
  const void* values;
  const uint8_t* masks;          // bitmask, two_of_four
  const int64_t* offsets;        // bitmask: tiles + 1; block: block rows + 1
  const int32_t* block_columns;  // block: [kept]
  const float* scales;           // int8: [rows]
  int64_t block_rows, block_width;
  int64_t kept;                  // values (blocks of them in the format block)
  int32_t format;
  const int32_t* row_sums;       // int8: [rows], from sparity_row_sums
  const void* group_scales;      // int4: [rows, columns / group]; columns: [columns / group, rows]
  const uint8_t* zeros;          // int4: zero points like group_scales; null = symmetric
  int32_t group, scale_type;     // int4: 32, 64 or 128, which divides columns
} SparityMatrix;

// The number of this interface; a library of another number is not used.
SPARITY_EXPORT int sparity_abi(void);

// The instruction sets that this processor can run by rank, "scalar" first; null beyond the last one.
SPARITY_EXPORT const char* sparity_isa_name(int rank);
// The highest rank.
SPARITY_EXPORT int sparity_isa_best(void);
// Chooses the instruction set of all later calls; SPARITY_UNSUPPORTED where there is no such rank.
SPARITY_EXPORT int sparity_isa_use(int rank);

// y[token, row] = sum over columns of weight[row, column] * x[token, column], for `tokens` >= 1.
// x: bfloat16 [tokens, columns]; y: [tokens, rows], bfloat16 or (wide) float32. Sums are float32; int8 weights meet
// inputs that are quantised per token, int4 weights inputs that are in blocks of 32 (see reference.py). The result does not depend on `threads`, and a token's result
// does not depend on the other tokens. In the format columns, an input of 0 adds nothing, whatever its weights are, and
// weights whose inputs are 0 for all tokens are not read.
SPARITY_EXPORT int sparity_gemv(const SparityMatrix* weight, const uint16_t* x, void* y, int wide, int64_t tokens,
                                int threads);

// The same for `count` weights, at most 64, of any formats that have the same columns: ys[i] is the y of weights[i] and
// xs[i], and equals what sparity_gemv gives. An input that several weights share (the same pointer) is prepared once.
SPARITY_EXPORT int sparity_gemv_many(const SparityMatrix* const* weights, int count, const uint16_t* const* xs,
                                     void* const* ys, int wide, int64_t tokens, int threads);

// Of a dense weight only the rows that `rows` [count] lists, rising: y's others are left as they are.
SPARITY_EXPORT int sparity_gemv_rows(const SparityMatrix* weight, const int32_t* rows, int64_t count, const uint16_t* x,
                                     void* y, int wide, int64_t tokens, int threads);

// A weight in the format columns, bfloat16, whose channels lie in slots: values [slots, rows], channel i in slots[i], which
// need not be there (-1) where its inputs are 0. y's bits are those of sparity_gemv with all channels in their places;
// SPARITY_UNSUPPORTED where an input meets a channel that is not there.
SPARITY_EXPORT int sparity_gemv_slots(const SparityMatrix* weight, const int32_t* slots, const uint16_t* x, void* y,
                                      int wide, int64_t tokens, int threads);

// Rows [begin, end) of the weight into out [end - begin, columns]: as they are stored, bfloat16 or int8; int4 values
// times their scales as bfloat16.
// begin is a multiple of 4 (of block_rows in the format block).
SPARITY_EXPORT int sparity_unpack(const SparityMatrix* weight, int64_t begin, int64_t end, void* out, int threads);

// The sum of each row's int8 values into out [rows]; it belongs into the weight before sparity_gemv. The formats block
// and columns need none.
SPARITY_EXPORT int sparity_row_sums(const SparityMatrix* weight, int32_t* out, int threads);

// x: bfloat16 [tokens, columns] -> int8 out and its scale per token; NaN as scale marks a token that is not finite.
SPARITY_EXPORT void sparity_quantize(const uint16_t* x, int64_t tokens, int64_t columns, int8_t* out, float* scales,
                                     int threads);

// ---- between the products of one decoding step; everything is bfloat16. The new tokens of all rows (the sequences of
// a batch) lie one after another, row by row: [tokens, ...]

// x[token] += add[token] (add may be null), then out[token] = weight * x[token] / rms(x[token]).
// x, add, out: [tokens, columns]; rounded where a model's modules round: the sum, the normed value and the product.
SPARITY_EXPORT void sparity_rms_norm(uint16_t* x, const uint16_t* add, const uint16_t* weight, float epsilon,
                                     int64_t tokens, int64_t columns, uint16_t* out, int threads);

// out = silu(gates) * ups, each rounded; all [count].
SPARITY_EXPORT void sparity_gate(const uint16_t* gates, const uint16_t* ups, int64_t count, uint16_t* out, int threads);

// out = silu(gates), rounded; all [count].
SPARITY_EXPORT void sparity_silu(const uint16_t* gates, int64_t count, uint16_t* out, int threads);

// Which channels of an input count: channel i of a token does where |x_i - m_i| > t_i s, in float32, or is NaN. What s is
// for a token: constant: 1. rms: the root of the mean of x_i^2. top: just so large that `kept` channels count, those with
// the largest |x_i - m_i| / t_i, the first of equal ones. statistical: the mean plus `deviations` standard deviations of
// |x_i - m_i| / t_i. 0 / 0 is infinite there.
enum { SPARITY_SKIP_CONSTANT = 0, SPARITY_SKIP_RMS = 1, SPARITY_SKIP_TOP = 2, SPARITY_SKIP_STATISTICAL = 3 };
typedef struct {
  const float* thresholds;  // t, [columns]
  const uint16_t* centre;   // m, [columns]; null = zeros
  int32_t scale;
  int64_t kept;
  double deviations;
} SparitySkip;

// x [tokens, columns] -> out, which may be x: x_i - m_i, rounded, where channel i counts, else 0; the weight times m is
// then to be added to the product. whole: uint8 [tokens], 1 for tokens that are copied as they are; null = none.
SPARITY_EXPORT int sparity_skip(const SparitySkip* skip, const uint16_t* x, const uint8_t* whole, int64_t tokens,
                                int64_t columns, uint16_t* out, int threads);

// The types of a cache's numbers. Those beyond bfloat16 are not built yet: SPARITY_UNSUPPORTED.
enum { SPARITY_CACHE_BFLOAT16 = 0, SPARITY_CACHE_INT8 = 1, SPARITY_CACHE_INT4 = 2 };

// Keys and values of one layer. Each row and head has a length of its own; new tokens are written from there on.
typedef struct {
  void *keys, *values;     // [rows, kv_heads, capacity, width]
  const float* scales;     // of quantised types; null for bfloat16
  const int64_t* lengths;  // [rows, kv_heads]: keys that are there before the new ones
  int64_t capacity;        // lengths + new tokens <= capacity
  float* mass;             // [rows, kv_heads, capacity], or null: what each key's softmax weights, over the query heads
                           // of the group and the new tokens, sum up to is added here
  int32_t type;
} SparityCache;

// One layer's attention. `width`, the size of a head, is a multiple of 16 and at most 512; kv_heads divides heads.
typedef struct {
  int64_t rows, tokens, heads, kv_heads, width;
  const int64_t* fresh;                   // [rows]: new tokens of each row, `tokens` in all; null = one each
  const uint16_t *cos, *sin;              // [tokens, width]: rotary tables at each token's position
  const uint16_t *query_norm, *key_norm;  // [width], or null where heads are not normed
  const uint8_t* visible;                 // [rows, visible_keys], 0 = not seen; null = all seen, as are keys beyond
  int64_t visible_keys;
  float scale, epsilon;
  SparityCache cache;
} SparityAttention;

// Norms and rotates q [tokens, heads, width] and k [tokens, kv_heads, width], appends k and v to the cache, and attends:
// a token to the keys that were there, to the new ones of its row before it, and to its own. out [tokens, heads, width];
// a token that sees no key gives zeros. A token's result is the same bits whatever other tokens come with it.
SPARITY_EXPORT int sparity_attend(const SparityAttention* attention, const uint16_t* q, const uint16_t* k,
                                  const uint16_t* v, uint16_t* out, int threads);

// One block: its attention and then its gated MLP. A null bias adds nothing; a null skip leaves a product's input as it
// is, and products of one input that have the same skip share its result. A shift is the weight times the skip's centre,
// null where there is none; it is added, like a bias, for the tokens of which channels are skipped.
typedef struct {
  const SparityMatrix *q, *k, *v, *o, *gate, *up, *down;
  const uint16_t *q_bias, *k_bias, *v_bias, *o_bias, *gate_bias, *up_bias, *down_bias;  // [rows]
  const uint16_t *attention_norm, *mlp_norm;                                            // [hidden]
  float attention_epsilon, mlp_epsilon;
  const SparitySkip *q_skip, *k_skip, *v_skip, *o_skip, *gate_skip, *up_skip, *down_skip;
  const float *q_shift, *k_shift, *v_shift, *o_shift, *gate_shift, *up_shift, *down_shift;  // [rows]
  // Of silu(gate), [neurons], with no centre: neurons that do not count are 0 for down, and a dense up is not computed for
  // those that count for no token. A null one leaves all neurons.
  const SparitySkip* neuron_skip;
  SparityAttention attention;  // rows, tokens, fresh, cos, sin and what is visible are those of the step
} SparityBlock;

// One step through all blocks and the last norm: stream [tokens, hidden] is read and written over, out is like it. The
// new tokens are in the caches afterwards; `lengths` stay what they were. Fields as in SparityAttention.
typedef struct {
  int64_t rows, tokens, hidden;
  const int64_t* fresh;
  const uint16_t *cos, *sin;
  const uint8_t* visible;
  int64_t visible_keys;
  const uint8_t* whole;  // [tokens]: 1 for tokens of which nothing is skipped; null = none
  const uint16_t* last_norm;
  float last_epsilon;
  uint16_t *stream, *out;
} SparityStep;

SPARITY_EXPORT int sparity_step(const SparityStep* step, const SparityBlock* blocks, int count, int threads);

// ---- attention over what a cache holds, read in place

// Tokens of a layer's cache, of each row and head as many as it holds: slots of buffers that all heads share.
typedef struct {
  const void *keys, *values;        // [slots, width] and [slots, value_width], or codes of them
  const int64_t *starts, *lengths;  // [rows, kv_heads]: a head's first slot, and how many are its own
  const int32_t* places;            // [slots]: of its token in the text, -1 = hidden; null = all are seen by all queries
  const float* added;               // [slots]: to logits; null = 0
  // Which of a head's pages are read, counted within it and rising: chosen[chosen_ends[pair - 1]] and on, up to
  // chosen_ends[pair]; null = all are. A page is `page` slots, at most 1024, or of codes a group.
  const int32_t* chosen;
  const int64_t* chosen_ends;  // [rows, kv_heads]
  int64_t page;
  // Codes of 2, 4 or 8 bits, the lowest bits first, stand for code * step + minimum: of keys one for each channel of a
  // group of tokens, of values for each token and so many `channels`. 0 bits: keys and values as they are.
  int32_t bits, type;                           // SPARITY_FLOAT32 or SPARITY_BFLOAT16: of numbers, steps and minima
  const void *key_steps, *key_minima;           // [groups, width]
  const void *value_steps, *value_minima;       // [slots, value_width / channels]
  const int64_t *group_starts, *group_lengths;  // [rows, kv_heads]: a head's first group, and how many
  const int32_t* group_counts;                  // [groups]: slots of each, at most `page`
  int64_t channels;
} SparitySlots;

// `fresh` queries of every row, the last of a text of `length` tokens: the one at place p sees slots of places 0 to p,
// where `visible` is not 0, and of a window only those above p - window.
typedef struct {
  int64_t rows, kv_heads, group, fresh, width, value_width;  // group: query heads for each key and value head
  int64_t length, window;                                    // window 0 = none
  const uint8_t* visible;                                    // [rows, length]; null = all
  const float* drains;                                       // [kv_heads * group]: a logit that pays for nothing; null
  float scale, cap;                                          // logits become cap * tanh(logit / cap); 0 = they stay
  int32_t type;                                              // of queries and results, float32 or bfloat16
  int32_t count;                                             // of parts
  const SparitySlots* parts;
} SparityReading;

// q [rows, kv_heads * group, fresh, width] -> out [rows, kv_heads * group, fresh, value_width], softmax over all parts
// together; a query that sees nothing gives 0. The result is the same bits for every number of threads, and does not
// depend on other rows and heads. Widths that the instruction set's vectors do not fill: SPARITY_UNSUPPORTED.
SPARITY_EXPORT int sparity_attend_slots(const SparityReading* reading, const void* q, void* out, int threads);

// Which pages are worth reading, by what is known of their keys: `low` and `high` are the least and the greatest number
// of each channel; or, where `levels` is not 0, the minimum and the step of codes 0 to `levels`; or `low` is their mean
// and `high` null. A page's worth to a query is the most that its product with such a key may be.
typedef struct {
  int64_t pairs, group, width;       // pairs: rows * kv_heads; group: query heads for each
  const void *queries, *low, *high;  // [pairs, group, width], [pages, width]
  const int64_t *starts, *lengths;   // [pairs]: a head's first page, and how many
  int32_t type, mean;                // of all numbers; over the group the mean is taken, not the largest
  float levels;
  const int64_t *leading, *trailing;  // [pairs]: pages at both ends that come first
  const int64_t* wanted;              // [pairs]: how many are chosen, of equal ones those further back
} SparityJudging;

// Chosen pages, rising, of one head after another; ends [pairs] counts them. Room for the sum of `wanted` is enough.
SPARITY_EXPORT int sparity_choose_pages(const SparityJudging* judging, int32_t* chosen, int64_t* ends, int threads);

// ---- attention of a prompt by blocks of queries and keys

// `fresh` queries of every row, the last of a text of `length` tokens, see the keys up to their own place, of those blocks
// that are kept. Blocks are counted from each row's first token behind its padding, of which queries and keys are none.
typedef struct {
  int64_t rows, heads, kv_heads, width, value_width;  // widths are multiples of 16, at most 512
  int64_t fresh, length;
  int64_t query_block, key_block, query_blocks, key_blocks;  // tokens of a block, and how many a row has at most
  const uint8_t* kept;                                       // [rows, heads, query_blocks, key_blocks], 0 = left out
  const int64_t* pads;                                       // [rows]: tokens of padding in front; null = none
  const float* drains;                                       // [heads]: a logit that pays for nothing; null
  float scale, cap;                                          // logits become cap * tanh(logit / cap); 0 = they stay
  int32_t type;                                              // of everything, SPARITY_FLOAT32 or SPARITY_BFLOAT16
  int64_t q_strides[3], k_strides[3], v_strides[3], out_strides[3];  // numbers from row to row, head to head, token to token
} SparityBlockAttention;

// q [rows, heads, fresh, width], k and v [rows, kv_heads, length, ...] -> out [rows, heads, fresh, value_width]; padding and
// queries that see nothing give 0. Keys and values are packed once, whatever is kept. The result is the same bits for every
// number of threads, and does not depend on other rows and heads.
SPARITY_EXPORT int sparity_attend_blocks(const SparityBlockAttention* attention, const void* q, const void* k,
                                         const void* v, void* out, int threads);

// Reads memory as the kernels do and gives the sum of its 64-bit words: what benchmarks measure the kernels' speed by.
SPARITY_EXPORT uint64_t sparity_read(const void* memory, int64_t bytes, int threads);

// Memory on large pages where the system has them; null when there is none. Freed with the same number of bytes.
SPARITY_EXPORT void* sparity_allocate(int64_t bytes);
SPARITY_EXPORT void sparity_free(void* memory, int64_t bytes);

#ifdef __cplusplus
}
#endif
