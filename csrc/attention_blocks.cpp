// The C interface of attention by blocks: keys and values are packed once, then blocks of queries are shared out over
// threads, so that no number depends on who found it.
#include "attention_blocks_kernels.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <memory>

#include "decode_kernels.h"

namespace {

using sparity::BlockKernels;
using sparity::kTileKeys;
using sparity::kTileQueries;

const BlockKernels& kernels(int32_t type) {
  switch (sparity::vectors_in_use()) {
#if defined(__x86_64__)
    case sparity::kAvx2:
      return sparity::avx2_blocks;
    case sparity::kAvx512:
      return sparity::avx512_blocks;
    case sparity::kAvx512Bf16:
      return type == SPARITY_BFLOAT16 ? sparity::avx512_bf16_blocks : sparity::avx512_blocks;
#elif defined(__aarch64__)
    case sparity::kNeon:
      return sparity::neon_blocks;
#endif
    default:
      (void)type;
      return sparity::scalar_blocks;
  }
}

// One row of the batch without its padding.
struct Row {
  int64_t pad, keys, skipped, queries;  // skipped queries are padding
};

Row row_of(const SparityBlockAttention& of, int64_t row) {
  const int64_t pad = of.pads ? of.pads[row] : 0, skipped = std::max<int64_t>(pad - (of.length - of.fresh), 0);
  return {pad, of.length - pad, skipped, of.fresh - skipped};
}

const char* at(const void* of, const int64_t* strides, int64_t row, int64_t head, int64_t token, int64_t element) {
  return static_cast<const char*>(of) + (row * strides[0] + head * strides[1] + token * strides[2]) * element;
}

}  // namespace

extern "C" {

int sparity_attend_blocks(const SparityBlockAttention* attention, const void* q, const void* k, const void* v, void* out,
                          int threads) {
  const SparityBlockAttention& of = *attention;
  const int64_t widest = std::max(of.width, of.value_width);
  if (of.width % sparity::kColumns || of.value_width % sparity::kColumns || widest > 512) return SPARITY_UNSUPPORTED;
  if (of.type != SPARITY_FLOAT32 && of.type != SPARITY_BFLOAT16) return SPARITY_UNSUPPORTED;
  const BlockKernels& isa = kernels(of.type);
  const int64_t element = of.type == SPARITY_FLOAT32 ? 4 : 2, tiles = tiles_of_block(of) * of.key_blocks;
  const int64_t tile_bytes = tile_numbers(of) * isa.element, pairs = of.rows * of.kv_heads, group = of.heads / of.kv_heads;
  const int64_t chunks_of_block = (of.query_block + kTileQueries - 1) / kTileQueries, chunks = chunks_of_block * of.query_blocks;
  const int64_t room = block_room(of), packed_bytes = pairs * tiles * tile_bytes;
  const int64_t all = (packed_bytes + 63) / 64 * 64 + room * threads;
  const std::unique_ptr<void, void (*)(void*)> memory(aligned_alloc(64, size_t((all + 127) / 64 * 64)), free);
  if (!memory) return SPARITY_UNSUPPORTED;
  auto* packed = static_cast<char*>(memory.get());
  char* rooms = packed + (packed_bytes + 63) / 64 * 64;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < pairs * tiles; ++unit) {
      const int64_t pair = unit / tiles, tile = unit % tiles, row = pair / of.kv_heads, head = pair % of.kv_heads;
      const Row own = row_of(of, row);
      const int64_t block = tile / tiles_of_block(of), inside = tile % tiles_of_block(of) * kTileKeys;
      const int64_t first = block * of.key_block + inside;
      const int64_t count = std::min({own.keys - first, of.key_block - inside, kTileKeys});
      if (count <= 0) continue;
      char* into = packed + unit * tile_bytes;
      isa.pack(of, {at(k, of.k_strides, row, head, own.pad + first, element), of.k_strides[2]},
               {at(v, of.v_strides, row, head, own.pad + first, element), of.v_strides[2]}, count,
               {into, into + tile_room(of) * of.width * isa.element});
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t unit = 0; unit < chunks * of.rows * of.heads; ++unit) {
      const int64_t chunk = chunks - 1 - unit / (of.rows * of.heads);  // the last queries see most: they come first
      const int64_t row = unit / of.heads % of.rows, head = unit % of.heads;
      const Row own = row_of(of, row);
      const int64_t block = chunk / chunks_of_block, inside = chunk % chunks_of_block * kTileQueries;
      const int64_t first = block * of.query_block + inside;
      const int64_t count = std::min({own.queries - first, of.query_block - inside, kTileQueries});
      if (count <= 0) continue;
      const int64_t token = own.skipped + first, pair = row * of.kv_heads + head / group;
      isa.attend({of,
                  {at(q, of.q_strides, row, head, token, element), of.q_strides[2]},
                  count,
                  own.keys - own.queries + first,
                  own.keys,
                  of.kept + ((row * of.heads + head) * of.query_blocks + block) * of.key_blocks,
                  packed + pair * tiles * tile_bytes,
                  of.drains ? of.drains + head : nullptr,
                  const_cast<char*>(at(out, of.out_strides, row, head, token, element)),
                  of.out_strides[2]},
                 rooms + omp_get_thread_num() * room);
    }
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < of.rows * of.heads; ++unit) {
      const int64_t row = unit / of.heads, head = unit % of.heads;
      for (int64_t token = 0; token < row_of(of, row).skipped; ++token)
        memset(const_cast<char*>(at(out, of.out_strides, row, head, token, element)), 0, size_t(of.value_width * element));
    }
  }
  return SPARITY_OK;
}

}  // extern "C"
