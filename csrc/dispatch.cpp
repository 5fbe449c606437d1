// The C interface: which instruction set runs, how the work is split over threads, and where inputs are prepared.
#include <stdlib.h>
#include <sys/mman.h>

#include <atomic>
#include <new>

#include "decode_kernels.h"
#include "kernels.h"
#include "numbers.h"

namespace {

using sparity::Kernels;

struct Level {
  const char* name;
  const Kernels* kernels;
};

const Level kLevels[] = {
    {"scalar", &sparity::scalar_kernels},
#if defined(__x86_64__)
    {"avx2", &sparity::avx2_kernels},
    {"avx512", &sparity::avx512_kernels},
    {"avx512_bf16", &sparity::avx512_bf16_kernels},
#endif
};
constexpr int kCount = int(sizeof(kLevels) / sizeof(kLevels[0]));

int best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("popcnt")) return 0;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return 1;
  if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vbmi2") ||
      !__builtin_cpu_supports("avx512vnni"))
    return 2;
  return 3;
#else
  return 0;
#endif
}

std::atomic<int> chosen{-1};

int in_use() {
  int rank = chosen.load(std::memory_order_relaxed);
  if (rank < 0) chosen.store(rank = best(), std::memory_order_relaxed);
  return rank;
}

const Kernels& kernels() { return *kLevels[in_use()].kernels; }

// Scratch memory of the calling thread, kept between calls.
class Scratch {
 public:
  ~Scratch() { free(memory_); }
  char* at_least(size_t bytes) {
    if (bytes > size_) {
      free(memory_);
      size_ = 0;
      memory_ = static_cast<char*>(aligned_alloc(64, (bytes + 63) / 64 * 64));
      if (memory_) size_ = bytes;
    }
    return memory_;
  }

 private:
  char* memory_ = nullptr;
  size_t size_ = 0;
};

thread_local Scratch scratch;

bool finite(uint16_t bits) { return (bits & 0x7f80) != 0x7f80; }

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

}  // namespace

int sparity::rank_in_use() { return in_use(); }

extern "C" {

int sparity_abi(void) { return SPARITY_ABI; }

const char* sparity_isa_name(int rank) { return rank >= 0 && rank < kCount ? kLevels[rank].name : nullptr; }

int sparity_isa_best(void) { return best(); }

int sparity_isa_use(int rank) {
  if (rank < 0 || rank > best()) return SPARITY_UNSUPPORTED;
  chosen.store(rank);
  return SPARITY_OK;
}

void sparity_quantize(const uint16_t* x, int64_t tokens, int64_t columns, int8_t* out, float* scales, int threads) {
  const Kernels& isa = kernels();
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t token = 0; token < tokens; ++token)
    isa.quantize(x + token * columns, columns, out + token * columns, scales + token);
}

int sparity_gemv(const SparityMatrix* weight, const uint16_t* x, void* y, int wide, int64_t tokens, int threads) {
  const Kernels& isa = kernels();
  const bool block = weight->format == SPARITY_BLOCK, quantized = weight->scales != nullptr;
  if (block && (quantized || weight->block_width % 16)) return SPARITY_UNSUPPORTED;
  if (quantized && weight->columns >= int64_t(1) << 20) return SPARITY_UNSUPPORTED;  // int32 sums could overflow
  const int64_t columns = weight->columns;
  const int64_t stride = round_up(round_up(columns, block ? weight->block_width : 1), sparity::kGroup) + 64;
  const int64_t element = quantized ? isa.int_bytes : isa.float_bytes;
  const size_t prepared = size_t(tokens * stride * element);
  char* memory = scratch.at_least(prepared + size_t(tokens) * (4 + (quantized ? columns : 0)) + 64);
  if (!memory) return SPARITY_UNSUPPORTED;
  float* scales = reinterpret_cast<float*>(memory + prepared);
  if (quantized) {
    auto* bytes = reinterpret_cast<int8_t*>(scales + tokens);
    for (int64_t token = 0; token < tokens; ++token) {
      isa.quantize(x + token * columns, columns, bytes + token * columns, scales + token);
      isa.prepare_ints(bytes + token * columns, columns, stride, memory + token * stride * element);
    }
  } else {
    for (int64_t token = 0; token < tokens; ++token) {
      isa.prepare_floats(x + token * columns, columns, stride, memory + token * stride * element);
      scales[token] = 0;
      if (block)
        for (int64_t column = 0; column < columns; ++column)
          if (!finite(x[token * columns + column])) scales[token] = 1;
    }
  }
  const sparity::Inputs in{memory, stride, scales};
  const sparity::Outputs out{y, wide != 0};
  const int64_t rows = block ? weight->block_rows : sparity::kTileRows;
  const int64_t units = (weight->rows + rows - 1) / rows;
  const int64_t share = units / (int64_t(threads) * 16) + 1;  // small enough that a thread held up is helped out
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t begin = 0; begin < units; begin += share)
    isa.gemv(*weight, in, out, tokens, begin, begin + share < units ? begin + share : units);
  return SPARITY_OK;
}

int sparity_unpack(const SparityMatrix* weight, int64_t begin, int64_t end, void* out, int threads) {
  if (weight->format != SPARITY_BITMASK && weight->format != SPARITY_TWO_OF_FOUR) return SPARITY_UNSUPPORTED;
  const Kernels& isa = kernels();
  const int64_t element = weight->scales ? 1 : 2, tile_rows = sparity::kTileRows;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = begin; row < end; row += tile_rows)
    isa.unpack_tile(*weight, row / tile_rows, end - row < tile_rows ? end - row : tile_rows,
                    static_cast<char*>(out) + (row - begin) * weight->columns * element);
  return SPARITY_OK;
}

uint64_t sparity_read(const void* memory, int64_t bytes, int threads) {
  const Kernels& isa = kernels();
  const int64_t words = bytes / 8, share = words / (int64_t(threads) * 16) + 1;
  uint64_t sum = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) reduction(+ : sum)
  for (int64_t begin = 0; begin < words; begin += share)
    sum += isa.read(static_cast<const uint64_t*>(memory) + begin, begin + share < words ? share : words - begin);
  return sum;
}

void* sparity_allocate(int64_t bytes) {
  constexpr int64_t kPage = int64_t(1) << 21;
  void* memory = aligned_alloc(size_t(kPage), size_t(round_up(bytes, kPage)));
#if defined(MADV_HUGEPAGE)
  if (memory) madvise(memory, size_t(round_up(bytes, kPage)), MADV_HUGEPAGE);
#endif
  return memory;
}

void sparity_free(void* memory, int64_t) { free(memory); }

}  // extern "C"
