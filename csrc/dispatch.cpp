// The C interface: which instruction set runs, how the work is split over threads, and where inputs are prepared.
#include <omp.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <new>

#include "decode_kernels.h"
#include "inputs.h"
#include "kernels.h"

namespace {

using sparity::Kernels;

struct Level {
  const char* name;
  const Kernels* kernels;
  sparity::Vectors vectors;
  bool (*runs)();
};

bool runs() { return true; }
#if defined(__x86_64__)
bool runs_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt");
}
#if defined(SPARITY_AVX_VNNI)
bool runs_avx_vnni() { return runs_avx2() && __builtin_cpu_supports("avxvnni"); }
#endif
bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool runs_avx512_bf16() {
  return runs_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni");
}
#endif

const Level kLevels[] = {
    {"scalar", &sparity::scalar_kernels, sparity::kScalar, runs},
#if defined(__x86_64__)
    {"avx2", &sparity::avx2_kernels, sparity::kAvx2, runs_avx2},
#if defined(SPARITY_AVX_VNNI)
    {"avx_vnni", &sparity::avx_vnni_kernels, sparity::kAvx2, runs_avx_vnni},
#endif
    {"avx512", &sparity::avx512_kernels, sparity::kAvx512, runs_avx512},
    {"avx512_bf16", &sparity::avx512_bf16_kernels, sparity::kAvx512Bf16, runs_avx512_bf16},
#elif defined(__aarch64__)
    {"neon", &sparity::neon_kernels, sparity::kNeon, runs},  // every one has it
#endif
};
constexpr int kCount = int(sizeof(kLevels) / sizeof(kLevels[0]));

// Those that this processor can run, the lowest first.
struct Runnable {
  const Level* levels[kCount];
  int count = 0;

  Runnable() {
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
    for (const Level& level : kLevels)
      if (level.runs()) levels[count++] = &level;
  }
};

const Runnable& runnable() {
  static const Runnable found;
  return found;
}

std::atomic<int> chosen{-1};

int in_use() {
  int rank = chosen.load(std::memory_order_relaxed);
  if (rank < 0) chosen.store(rank = runnable().count - 1, std::memory_order_relaxed);
  return rank;
}

const Level& level() { return *runnable().levels[in_use()]; }

const Kernels& kernels() { return *level().kernels; }

// The part of the work that a thread takes first, from front to back, so that it reads memory on where it was.
struct alignas(64) Lane {
  std::atomic<int64_t> next;
  int64_t end;
};

// Calls work(begin, end) for parts of [0, units). A thread has a lane of its own, and then helps out in the others.
template <class Work>
void share_out(int64_t units, int threads, const Work& work) {
  constexpr int kMost = 64;
  Lane lanes[kMost];
  const int count = threads < kMost ? threads : kMost;
  for (int i = 0; i < count; ++i) {
    lanes[i].next.store(units * i / count, std::memory_order_relaxed);
    lanes[i].end = units * (i + 1) / count;
  }
  const int64_t share = units / (int64_t(threads) * 16) + 1;  // small enough that a thread held up is helped out
#pragma omp parallel num_threads(threads)
  for (int turn = 0; turn < count; ++turn) {
    Lane& lane = lanes[(omp_get_thread_num() + turn) % count];
    int64_t begin;
    while ((begin = lane.next.fetch_add(share, std::memory_order_relaxed)) < lane.end)
      work(begin, std::min(begin + share, lane.end));
  }
}

bool supported(const SparityMatrix& weight) {
  if (weight.group) return weight.format != SPARITY_BLOCK && weight.columns % weight.group == 0;
  if (weight.format == SPARITY_BLOCK) return !weight.scales && weight.block_width % 16 == 0;
  return !weight.scales || weight.columns < int64_t(1) << 17;  // beyond, int32 sums could overflow
}

// What threads share out: tiles of 4 rows (of 16 where int4 lies side by side), or rows of blocks; in the format columns, tiles of each
// range of channels.
int64_t units_of(const SparityMatrix& weight) {
  const int64_t tile = sparity::side_by_side(weight) ? sparity::kSideBySide : sparity::kTileRows;
  const int64_t rows = weight.format == SPARITY_BLOCK ? weight.block_rows : tile;
  const int64_t parts = weight.format == SPARITY_COLUMNS ? column_parts(weight) : 1;
  return (weight.rows + rows - 1) / rows * parts;
}

}  // namespace

sparity::Vectors sparity::vectors_in_use() { return level().vectors; }

extern "C" {

int sparity_abi(void) { return SPARITY_ABI; }

const char* sparity_isa_name(int rank) {
  return rank >= 0 && rank < runnable().count ? runnable().levels[rank]->name : nullptr;
}

int sparity_isa_best(void) { return runnable().count - 1; }

int sparity_isa_use(int rank) {
  if (rank < 0 || rank >= runnable().count) return SPARITY_UNSUPPORTED;
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
  return sparity_gemv_many(&weight, 1, &x, &y, wide, tokens, threads);
}

int sparity_gemv_many(const SparityMatrix* const* weights, int count, const uint16_t* const* xs, void* const* ys,
                      int wide, int64_t tokens, int threads) {
  if (count < 1) return SPARITY_OK;
  if (count > kMostWeights) return SPARITY_UNSUPPORTED;
  for (int i = 0; i < count; ++i)
    if (!supported(*weights[i]) || weights[i]->columns != weights[0]->columns) return SPARITY_UNSUPPORTED;
  const Kernels& isa = kernels();
  sparity::Inputs inputs[kMostWeights];
  if (!prepare(isa, weights, count, xs, tokens, threads, inputs)) return SPARITY_UNSUPPORTED;
  int64_t units = 0;
  for (int i = 0; i < count; ++i) units += units_of(*weights[i]);
  share_out(units, threads, [&](int64_t begin, int64_t end) {
    int64_t first = 0;  // units are counted through all weights, and this is where a weight's own begin
    for (int i = 0; i < count; ++i) {
      const SparityMatrix& weight = *weights[i];
      const int64_t own = units_of(weight);
      const int64_t from = std::max(begin - first, int64_t(0)), to = std::min(end - first, own);
      if (from < to) isa.gemv(weight, inputs[i], {ys[i], wide != 0}, tokens, from, to);
      first += own;
    }
  });
  return SPARITY_OK;
}

int sparity_gemv_rows(const SparityMatrix* weight, const int32_t* rows, int64_t count, const uint16_t* x, void* y,
                      int wide, int64_t tokens, int threads) {
  if (weight->format != SPARITY_DENSE || !supported(*weight)) return SPARITY_UNSUPPORTED;
  const Kernels& isa = kernels();
  sparity::Inputs in;
  if (!prepare(isa, &weight, 1, &x, tokens, threads, &in)) return SPARITY_UNSUPPORTED;
  share_out(count, threads, [&](int64_t begin, int64_t end) {
    isa.listed(*weight, in, {y, wide != 0}, tokens, rows, count, begin, end);
  });
  return SPARITY_OK;
}

int sparity_gemv_slots(const SparityMatrix* weight, const int32_t* slots, const uint16_t* x, void* y, int wide,
                       int64_t tokens, int threads) {
  if (weight->format != SPARITY_COLUMNS || weight->scales || weight->group) return SPARITY_UNSUPPORTED;
  const Kernels& isa = kernels();
  sparity::Inputs in;
  if (!prepare(isa, &weight, 1, &x, tokens, threads, &in)) return SPARITY_UNSUPPORTED;
  auto* channels = const_cast<int32_t*>(in.channels);  // of this thread's own memory; ranges are cut already
  for (int64_t i = 0; i < in.count; ++i)
    if ((channels[i] = slots[channels[i]]) < 0) return SPARITY_UNSUPPORTED;
  share_out(units_of(*weight), threads,
            [&](int64_t begin, int64_t end) { isa.gemv(*weight, in, {y, wide != 0}, tokens, begin, end); });
  return SPARITY_OK;
}

int sparity_row_sums(const SparityMatrix* weight, int32_t* out, int threads) {
  if (weight->format == SPARITY_BLOCK || weight->format == SPARITY_COLUMNS || !weight->scales) return SPARITY_UNSUPPORTED;
  const Kernels& isa = kernels();
  const int64_t tiles = units_of(*weight);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t tile = 0; tile < tiles; ++tile) {
    int64_t sums[sparity::kTileRows];
    isa.row_sums(*weight, tile, sums);
    const int64_t first = tile * sparity::kTileRows, rows = std::min(weight->rows - first, sparity::kTileRows);
    for (int64_t row = 0; row < rows; ++row) out[first + row] = int32_t(sums[row]);
  }
  return SPARITY_OK;
}

int sparity_unpack(const SparityMatrix* weight, int64_t begin, int64_t end, void* out, int threads) {
  if (weight->format != SPARITY_BITMASK && weight->format != SPARITY_TWO_OF_FOUR && !weight->group)
    return SPARITY_UNSUPPORTED;
  const Kernels& isa = kernels();
  const int64_t element = weight->scales ? 1 : 2, tile_rows = weight->format == SPARITY_COLUMNS ? 128 : sparity::kTileRows;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = begin; row < end; row += tile_rows)
    isa.unpack_tile(*weight, row / sparity::kTileRows, end - row < tile_rows ? end - row : tile_rows,
                    static_cast<char*>(out) + (row - begin) * weight->columns * element);
  return SPARITY_OK;
}

uint64_t sparity_read(const void* memory, int64_t bytes, int threads) {
  const Kernels& isa = kernels();
  constexpr int64_t kWords = 4096;
  const int64_t words = bytes / 8;
  std::atomic<uint64_t> sum{0};
  share_out(round_up(words, kWords) / kWords, threads, [&](int64_t begin, int64_t end) {
    const auto* from = static_cast<const uint64_t*>(memory) + begin * kWords;
    sum += isa.read(from, std::min(end * kWords, words) - begin * kWords);
  });
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
