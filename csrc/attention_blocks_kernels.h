// What an instruction set provides for attention by blocks of queries and keys, and what a task of it is.
#pragma once

#include "sparity_kernels.h"

namespace sparity {

constexpr int64_t kTileKeys = 64;     // keys that are multiplied at a time, at most
constexpr int64_t kTileQueries = 64;  // queries of a task, at most
constexpr int64_t kColumns = 16;      // widths, and what tiles of keys have room for, are multiples of it

// Where the numbers of one row and head lie, and how far it is from token to token.
struct Tokens {
  const void* at;
  int64_t stride;
};

// Keys and values of a tile as they are multiplied: [width / step, room, step] and [room / step, value_width, step],
// zeros behind the last key.
struct PackedTile {
  void *keys, *values;
};

// Neighbouring queries of one head in one block of queries.
struct BlockTask {
  const SparityBlockAttention& of;
  Tokens queries;        // the first of them
  int64_t count;         // kTileQueries at most
  int64_t place;         // of the first among the row's keys
  int64_t keys;          // of the row
  const uint8_t* kept;   // [key blocks]
  const char* packed;    // the tiles of this row and key head, one behind the other
  const float* drain;    // or null
  void* out;
  int64_t out_stride;
};

struct BlockKernels {
  int64_t element, step;  // bytes of a packed number; numbers that meet in one multiplication
  // `count` tokens from `keys` and `values` on.
  void (*pack)(const SparityBlockAttention& of, Tokens keys, Tokens values, int64_t count, const PackedTile& into);
  // `room`: block_room(of) bytes.
  void (*attend)(const BlockTask& task, char* room);
};

extern const BlockKernels scalar_blocks;
#if defined(__x86_64__)
extern const BlockKernels avx2_blocks;
extern const BlockKernels avx512_blocks;
extern const BlockKernels avx512_bf16_blocks;  // bfloat16 alone
#elif defined(__aarch64__)
extern const BlockKernels neon_blocks;
#endif

}  // namespace sparity

// Of internal linkage, as each file is compiled for another processor.
namespace {

// Keys that a packed tile has room for, and how many tiles a block of keys has.
inline int64_t tile_room(const SparityBlockAttention& of) {
  const int64_t keys = of.key_block < sparity::kTileKeys ? of.key_block : sparity::kTileKeys;
  return (keys + sparity::kColumns - 1) / sparity::kColumns * sparity::kColumns;
}
inline int64_t tiles_of_block(const SparityBlockAttention& of) { return (of.key_block + sparity::kTileKeys - 1) / sparity::kTileKeys; }

inline int64_t tile_numbers(const SparityBlockAttention& of) { return tile_room(of) * (of.width + of.value_width); }

// Bytes that a task works in: its queries, and its sums.
inline int64_t block_room(const SparityBlockAttention& of) { return sparity::kTileQueries * 4 * (of.width + of.value_width); }

}  // namespace
