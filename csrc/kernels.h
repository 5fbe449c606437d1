// What an instruction set provides, and what dispatch.cpp gives to it.
#pragma once

#include "sparity_kernels.h"

namespace sparity {

constexpr int64_t kTileRows = 4;
constexpr int64_t kGroup = 64;  // columns
constexpr int64_t kSideBySide = 16;  // rows of a tile in which they lie side by side
constexpr int64_t kScaleLanes = 16;  // of an int4 weight's or input's scales, which are read in whole vectors
constexpr int kChannels = 8;               // input channels that are added at a time
constexpr int64_t kMostTokens = 16;        // that share a tile's sums
constexpr int64_t kMostRows = 8192, kMostSums = 16384;  // of a tile of the format columns, and their sums
constexpr int64_t kMostLine = 128;                      // rows of a cache line in any encoding
constexpr int kMostParts = 8;                           // ranges of its channels

// Whether sixteen rows lie side by side: int4, dense or two of four.
inline bool side_by_side(const SparityMatrix& weight) {
  return weight.group && (weight.format == SPARITY_DENSE || weight.format == SPARITY_TWO_OF_FOUR);
}

// Inputs as a kernel reads them: [tokens, stride], zeros behind the columns.
struct Inputs {
  const void* x;        // what Kernels::prepare wrote
  int64_t stride;       // elements from token to token
  // Per token. int8: its scale, NaN where it is not finite; floats, for blocks: 1 where it is not finite, else 0.
  // int4: of each group of inputs, [tokens, group_stride].
  const float* scales;
  // The format columns: what of x is not zero for all tokens; x has no other.
  const int32_t* channels = nullptr;
  int64_t count = 0;              // of channels
  const int32_t* sums = nullptr;  // int8: of each token's inputs
  int64_t tile_rows = 0;          // whole lines, at most kMostRows; tokens * tile_rows <= kMostSums
  int64_t parts = 1;                      // ranges of channels, whose sums are computed by themselves
  int64_t begins[kMostParts + 1] = {};    // where each begins in the list, and the last ends
  void* partial = nullptr;                // of several: [parts, tokens, rows], whole lines of rows
  int32_t* done = nullptr;                // of each tile, how many ranges are there already
  int64_t group_stride = 0, shift_stride = 0;
  const int32_t* shifts = nullptr;  // int4: minus 8 times the inputs of each partial sum; of columns, each group's inputs
  const int32_t* groups = nullptr;  // int4, columns: where each group of channels begins in the list; `begins` are groups
};

struct Outputs {
  void* y;
  bool wide;
};

struct Kernels {
  int64_t float_bytes, int_bytes;  // bytes of one prepared input
  void (*prepare_floats)(const uint16_t* x, int64_t columns, int64_t stride, void* out);
  void (*prepare_ints)(const int8_t* x, int64_t columns, int64_t stride, void* out);
  // One token as int8; NaN as scale and zeros when it is not finite.
  void (*quantize)(const uint16_t* x, int64_t columns, int8_t* out, float* scale);
  // One token as int8 in groups, in the order in which dense weights (paired) or others are multiplied.
  void (*prepare_fours)(const uint16_t* x, int64_t columns, int64_t stride, int64_t group, bool paired, int8_t* out,
                        float* scales, int32_t* shifts);
  // Reads whole vectors and does nothing with them: the speed of memory.
  uint64_t (*read)(const uint64_t* words, int64_t count);
  // The rows of units [begin, end): tiles of 4 rows, or rows of blocks.
  void (*gemv)(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t tokens, int64_t begin,
               int64_t end);
  // Rows rows[begin] to rows[end - 1] of `count`, of a dense weight.
  void (*listed)(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t tokens,
                 const int32_t* rows, int64_t count, int64_t begin, int64_t end);
  // One tile (from `tile` on, 4 rows or fewer) as rows of out [rows, columns].
  void (*unpack_tile)(const SparityMatrix& weight, int64_t tile, int64_t rows, void* out);
  // The sums of one tile's int8 values.
  void (*row_sums)(const SparityMatrix& weight, int64_t tile, int64_t sums[kTileRows]);
};

extern const Kernels scalar_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx_vnni_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512_bf16_kernels;
#elif defined(__aarch64__)
extern const Kernels neon_kernels;
#endif

}  // namespace sparity
