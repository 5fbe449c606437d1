// The C interface of attention over what a cache holds: slices of all heads are shared out over threads, and what they
// find is put together in their order, so that no number depends on who found it.
#include <float.h>
#include <math.h>
#include <stdlib.h>

#include <algorithm>
#include <memory>

#include "attention_kernels.h"
#include "exponential.h"
#include "decode_kernels.h"
#include "numbers.h"

namespace {

using sparity::AttentionKernels;
using sparity::Found;
using sparity::kPack;
using sparity::kSlice;
using sparity::Run;

constexpr int64_t kAlone = 1 << 15;  // numbers that one thread reads sooner than others wake

// The kernels in use for loads of `per` numbers for each lane, or null where they do not fill the widths.
const AttentionKernels* kernels(int64_t per, int64_t width, int64_t value_width) {
  const AttentionKernels* found[sparity::kAllVectors] = {&sparity::scalar_attention};
#if defined(__x86_64__)
  found[sparity::kAvx2] = &sparity::avx2_attention;
  found[sparity::kAvx512] = &sparity::avx512_attention;
  found[sparity::kAvx512Bf16] = &sparity::avx512_bf16_attention;
#elif defined(__aarch64__)
  found[sparity::kNeon] = &sparity::neon_attention;
#endif
  for (int vectors = sparity::vectors_in_use(); vectors >= 0; --vectors) {
    const int64_t load = found[vectors] ? found[vectors]->lanes * per : 0;
    if (load && width % load == 0 && value_width % load == 0) return found[vectors];
  }
  return nullptr;
}

int64_t per_of(const SparitySlots& slots) { return slots.bits ? 8 / slots.bits : slots.type == SPARITY_FLOAT32 ? 1 : 2; }

// What a head's slices are made of: slots, or pages of some or all of them.
int64_t units_of(const SparitySlots& slots, int64_t pair) {
  if (slots.chosen) return slots.chosen_ends[pair] - (pair ? slots.chosen_ends[pair - 1] : 0);
  return slots.bits ? slots.group_lengths[pair] : slots.lengths[pair];
}

int64_t units_of_slice(const SparitySlots& slots) {
  return slots.chosen || slots.bits ? std::max<int64_t>(kSlice / slots.page, 1) : kSlice;
}

int64_t slices_of(const SparitySlots& slots, int64_t pair) {
  const int64_t each = units_of_slice(slots);
  return (units_of(slots, pair) + each - 1) / each;
}

// The runs of a slice, at most kSlice.
int64_t runs_of(const SparitySlots& slots, int64_t pair, int64_t slice, Run* runs) {
  const int64_t each = units_of_slice(slots), begin = slice * each, end = std::min(begin + each, units_of(slots, pair));
  const int64_t start = slots.starts[pair], length = slots.lengths[pair];
  if (!slots.chosen && !slots.bits) {
    runs[0] = {start + begin, end - begin, 0};
    return 1;
  }
  const int32_t* chosen = slots.chosen ? slots.chosen + (pair ? slots.chosen_ends[pair - 1] : 0) : nullptr;
  int64_t count = 0, group = 0, slot = start;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t page = chosen ? chosen[unit] : unit;
    if (slots.bits) {
      const int32_t* counts = slots.group_counts + slots.group_starts[pair];
      for (; group < page; ++group) slot += counts[group];
      if (counts[page]) runs[count++] = {slot, counts[page], slots.group_starts[pair] + page};
      continue;
    }
    const int64_t first = page * slots.page, many = std::min(slots.page, length - first);
    if (count && runs[count - 1].slot + runs[count - 1].count == start + first) runs[count - 1].count += many;
    else runs[count++] = {start + first, many, 0};
  }
  return count;
}

// All slices of a reading, numbered part by part within a head and head by head.
struct Plan {
  const SparityReading& reading;
  const AttentionKernels* kernels[4];
  int64_t packed, packs;  // queries of a head, and how often kPack of them read a slice

  int64_t slices(int64_t pair) const {
    int64_t count = 0;
    for (int part = 0; part < reading.count; ++part) count += slices_of(reading.parts[part], pair);
    return count;
  }
};

struct Room {
  float *highest, *total, *sums;  // [slices, packed], likewise, [slices, packed, value_width]
};

void attend_one(const Plan& plan, const void* q, int64_t pair, int64_t slice, const Room& room) {
  const SparityReading& of = plan.reading;
  int part = 0;
  for (; slice >= slices_of(of.parts[part], pair); ++part) slice -= slices_of(of.parts[part], pair);
  Run runs[kSlice];
  const int64_t count = runs_of(of.parts[part], pair, slice, runs);
  const int64_t bytes = (of.type == SPARITY_FLOAT32 ? 4 : 2) * of.width;
  for (int64_t first = 0; first < plan.packed; first += kPack) {
    const auto* queries = static_cast<const uint8_t*>(q) + (pair * plan.packed + first) * bytes;
    const int64_t packed = std::min(kPack, plan.packed - first);
    plan.kernels[part]->attend({of, of.parts[part], pair / of.kv_heads, pair, runs, count, queries, first, packed},
                               {room.highest + first, room.total + first, room.sums + first * of.value_width});
  }
}

// What the slices of a head found for one query becomes its result.
void merge(const SparityReading& of, int64_t slices, int64_t packed, int64_t query, const float* drain, const Room& room,
           void* out) {
  float best = drain ? *drain : -INFINITY;
  for (int64_t s = 0; s < slices; ++s) best = std::max(best, room.highest[s * packed + query]);
  float total = drain && best != -INFINITY ? exponential(*drain - best) : 0.0f;
  float sums[sparity::kMostHeadWidth] = {};
  for (int64_t s = 0; s < slices; ++s) {
    const int64_t at = s * packed + query;
    const float share = room.highest[at] == -INFINITY ? 0.0f : exponential(room.highest[at] - best);
    total += room.total[at] * share;
    for (int64_t i = 0; i < of.value_width; ++i) sums[i] += room.sums[at * of.value_width + i] * share;
  }
  for (int64_t i = 0; i < of.value_width; ++i) {
    const float value = total == 0 ? 0.0f : sums[i] / total;
    if (of.type == SPARITY_FLOAT32) static_cast<float*>(out)[i] = value;
    else static_cast<uint16_t*>(out)[i] = to_bfloat16(value);
  }
}

// The `wanted` pages of one head, rising.
void choose(const SparityJudging& of, int64_t pair, float* worth, int32_t* order, int32_t* chosen) {
  const int64_t pages = of.lengths[pair], wanted = std::min(of.wanted[pair], pages);
  for (int64_t page = 0; page < pages; ++page) {
    order[page] = int32_t(page);
    if (worth[page] != worth[page]) worth[page] = FLT_MAX;  // so that a fault shows
    worth[page] = std::max(-FLT_MAX, std::min(FLT_MAX, worth[page]));
    if (page < of.leading[pair] || page >= pages - of.trailing[pair]) worth[page] = INFINITY;
  }
  std::nth_element(order, order + wanted, order + pages, [worth](int32_t a, int32_t b) {
    return worth[a] > worth[b] || (worth[a] == worth[b] && a > b);
  });
  std::sort(order, order + wanted);
  std::copy(order, order + wanted, chosen);
}

std::unique_ptr<char, void (*)(void*)> memory_of(int64_t bytes) {
  return {static_cast<char*>(malloc(size_t(bytes) + 1)), free};
}

}  // namespace

extern "C" {

int sparity_attend_slots(const SparityReading* reading, const void* q, void* out, int threads) {
  const SparityReading& of = *reading;
  Plan plan = {of, {}, of.group * of.fresh, 0};
  const int64_t pairs = of.rows * of.kv_heads, packed = plan.packed;
  if (of.count > 4 || of.width > sparity::kMostHeadWidth || of.value_width > sparity::kMostHeadWidth)
    return SPARITY_UNSUPPORTED;
  int64_t slots = 0;
  for (int part = 0; part < of.count; ++part) {
    const SparitySlots& own = of.parts[part];
    plan.kernels[part] = kernels(per_of(own), of.width, of.value_width);
    const bool paged = own.chosen || own.bits;
    if (!plan.kernels[part] || (paged && (own.page < 1 || own.page > kSlice))) return SPARITY_UNSUPPORTED;
    if (own.bits && own.channels % (4 * per_of(own) * 2)) return SPARITY_UNSUPPORTED;
    for (int64_t pair = 0; pair < pairs; ++pair) slots += own.lengths[pair];
  }
  const auto first_slice = memory_of((pairs + 1) * 8);
  if (!first_slice) return SPARITY_UNSUPPORTED;
  auto* first = reinterpret_cast<int64_t*>(first_slice.get());
  first[0] = 0;
  for (int64_t pair = 0; pair < pairs; ++pair) first[pair + 1] = first[pair] + plan.slices(pair);
  const int64_t tasks = first[pairs];
  const auto memory = memory_of(tasks * packed * (of.value_width + 2) * 4);
  if (!memory) return SPARITY_UNSUPPORTED;
  auto* room = reinterpret_cast<float*>(memory.get());
  const auto room_of = [=, &of](int64_t slice) {
    return Room{room + slice * packed, room + (tasks + slice) * packed,
                room + 2 * tasks * packed + slice * packed * of.value_width};
  };
  const int used = slots * of.width > kAlone ? threads : 1;
  const int64_t element = of.type == SPARITY_FLOAT32 ? 4 : 2;
#pragma omp parallel num_threads(used)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t pair = std::upper_bound(first, first + pairs + 1, task) - first - 1;
      attend_one(plan, q, pair, task - first[pair], room_of(task));
    }
#pragma omp for schedule(static)
    for (int64_t at = 0; at < pairs * packed; ++at) {
      const int64_t pair = at / packed, query = at % packed;
      const int64_t head = pair % of.kv_heads * of.group + query / of.fresh;
      merge(of, first[pair + 1] - first[pair], packed, query, of.drains ? of.drains + head : nullptr,
            room_of(first[pair]), static_cast<char*>(out) + at * of.value_width * element);
    }
  }
  return SPARITY_OK;
}

int sparity_choose_pages(const SparityJudging* judging, int32_t* chosen, int64_t* ends, int threads) {
  const SparityJudging& of = *judging;
  const AttentionKernels* isa = kernels(of.type == SPARITY_FLOAT32 ? 1 : 2, of.width, of.width);
  if (!isa || of.width > sparity::kMostHeadWidth) return SPARITY_UNSUPPORTED;
  int64_t most = 0, all = 0, before = 0;
  for (int64_t pair = 0; pair < of.pairs; ++pair) {
    most = std::max(most, of.lengths[pair]);
    all += of.lengths[pair];
    before += std::min(of.wanted[pair], of.lengths[pair]);
    ends[pair] = before;
  }
  const auto memory = memory_of(of.pairs * most * 8);
  if (!memory) return SPARITY_UNSUPPORTED;
  const int used = all * of.width > kAlone ? threads : 1;
#pragma omp parallel for schedule(dynamic, 1) num_threads(used)
  for (int64_t pair = 0; pair < of.pairs; ++pair) {
    auto* worth = reinterpret_cast<float*>(memory.get()) + pair * most;
    auto* order = reinterpret_cast<int32_t*>(memory.get()) + (of.pairs + pair) * most;
    isa->judge(of, pair, 0, of.lengths[pair], worth);
    choose(of, pair, worth, order, chosen + (pair ? ends[pair - 1] : 0));
  }
  return SPARITY_OK;
}

}  // extern "C"
