// What an instruction set provides for attention over what a cache holds, and what a task of it is.
#pragma once

#include "sparity_kernels.h"

namespace sparity {

constexpr int64_t kSlice = 1024;       // slots that a task reads at most
constexpr int64_t kPack = 16;          // queries that read them together
constexpr int64_t kMostHeadWidth = 512;

// Slots one behind the other, all of one group of codes where there are any.
struct Run {
  int64_t slot, count, group;
};

// Some slots of one row and head, and the queries that read them.
struct Slice {
  const SparityReading& reading;
  const SparitySlots& slots;
  int64_t row, pair;          // pair = row * kv_heads + head
  const Run* runs;            // kSlice slots or fewer in all
  int64_t count;              // of runs
  const void* queries;        // [packed, width], of the reading's type
  int64_t first, packed;      // among the queries of the head; packed <= kPack
};

// What a slice gives for each query: its highest logit, the sum of e^(logit - highest), and the values so weighted.
struct Found {
  float *highest, *total;  // [packed]
  float* sums;             // [packed, value_width]
};

struct AttentionKernels {
  int64_t lanes;
  void (*attend)(const Slice& slice, const Found& found);
  // What the pages [begin, end) of a row and head may be worth to its queries.
  void (*judge)(const SparityJudging& judging, int64_t pair, int64_t begin, int64_t end, float* out);
};

extern const AttentionKernels scalar_attention;
#if defined(__x86_64__)
extern const AttentionKernels avx2_attention;
extern const AttentionKernels avx512_attention;
extern const AttentionKernels avx512_bf16_attention;
#elif defined(__aarch64__)
extern const AttentionKernels neon_attention;
#endif

}  // namespace sparity
