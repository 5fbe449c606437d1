// Attention of a few queries over slots of a cache, read in place: logits of a slice, their softmax, and the values so
// weighted. All query heads that share a key and value head read it together. Templates over an instruction set I, which
// has vectors of kLanes float32; everything has internal linkage, as each file is compiled for another processor.
#pragma once

#include <math.h>

#include "attention_kernels.h"
#include "attention_sources.h"
#include "exponential.h"

namespace {

using sparity::Found;
using sparity::kMostHeadWidth;
using sparity::kPack;
using sparity::kSlice;
using sparity::Run;
using sparity::Slice;

constexpr int64_t kStretch = 64;  // keys that stay in the first cache while all queries read them

// Steps and minima of the numbers of a row, in the order of its vectors.
struct Grid {
  const float *steps, *minima;
};

template <class I>
constexpr int keys_of(int queries) {  // that are multiplied at a time: sums stay in registers
  int keys = I::kTile;
  while (keys * queries > I::kTile) keys /= 2;
  return keys;
}

template <class I, class S, int Queries, int Keys, int Part>
inline void multiply_part(const typename S::Raw (&raw)[Keys], const float* queries, int64_t width, const Grid& grid,
                          int64_t at, typename I::F (&sums)[I::kTile]) {
  if constexpr (Part < S::kPer) {
    const int64_t from = at + Part * I::kLanes;
    typename I::F q[Queries];
    for (int i = 0; i < Queries; ++i) q[i] = I::load(queries + i * width + from);
    for (int key = 0; key < Keys; ++key) {
      typename I::F k = S::template vector<Part>(raw[key]);
      if (S::kCoded) k = I::fma(k, I::load(grid.steps + from), I::load(grid.minima + from));
      for (int i = 0; i < Queries; ++i) sums[i * Keys + key] = I::fma(k, q[i], sums[i * Keys + key]);
    }
    multiply_part<I, S, Queries, Keys, Part + 1>(raw, queries, width, grid, at, sums);
  }
}

// out[q][key] = queries[q] . keys[key] for Keys keys.
template <class I, class S, int Queries, int Keys>
inline void tile(const uint8_t* keys, int64_t stride, const float* queries, int64_t width, const Grid& grid, int count,
                 float* out, int64_t room) {
  typename I::F sums[I::kTile];
  for (int i = 0; i < I::kTile; ++i) sums[i] = I::zero();
  for (int64_t at = 0; at < width; at += I::kLanes * S::kPer) {
    typename S::Raw raw[Keys];
    for (int key = 0; key < Keys; ++key) raw[key] = S::load(keys + key * stride + S::bytes(at));
    multiply_part<I, S, Queries, Keys, 0>(raw, queries, width, grid, at, sums);
  }
  alignas(64) float totals[I::kTile];
  I::totals(sums, totals);
  for (int i = 0; i < Queries; ++i)
    for (int key = 0; key < count; ++key) out[i * room + key] = totals[i * Keys + key];
}

template <class I, class S, int Queries>
inline void dots(const uint8_t* keys, int64_t count, const float* queries, int64_t width, const Grid& grid, float* out,
                 int64_t room) {
  constexpr int kKeys = keys_of<I>(Queries);
  const int64_t stride = S::bytes(width);
  int64_t key = 0;
  for (; key + kKeys <= count; key += kKeys)
    tile<I, S, Queries, kKeys>(keys + key * stride, stride, queries, width, grid, kKeys, out + key, room);
  if (key == count) return;
  alignas(64) uint8_t last[kKeys * kMostHeadWidth * 4] = {};  // the same sums as in a whole tile
  memcpy(last, keys + key * stride, size_t((count - key) * stride));
  tile<I, S, Queries, kKeys>(last, stride, queries, width, grid, int(count - key), out + key, room);
}

// out[q][key] for all queries.
template <class I, class S>
inline void all_dots(const uint8_t* keys, int64_t count, const float* queries, int64_t packed, int64_t width,
                     const Grid& grid, float* out, int64_t room) {
  int64_t i = 0;
  for (; i + 4 <= packed; i += 4) dots<I, S, 4>(keys, count, queries + i * width, width, grid, out + i * room, room);
  if (packed - i == 3) dots<I, S, 3>(keys, count, queries + i * width, width, grid, out + i * room, room);
  if (packed - i == 2) dots<I, S, 2>(keys, count, queries + i * width, width, grid, out + i * room, room);
  if (packed - i == 1) dots<I, S, 1>(keys, count, queries + i * width, width, grid, out + i * room, room);
}

template <class I, class S, int Queries, int Part>
inline void add_part(const typename S::Raw& raw, const typename I::F (&weights)[Queries], const typename I::F& step,
                     const typename I::F& minimum, typename I::F* sums, int parts) {
  if constexpr (Part < S::kPer) {
    typename I::F v = S::template vector<Part>(raw);
    if (S::kCoded) v = I::fma(v, step, minimum);
    for (int i = 0; i < Queries; ++i) sums[i * parts + Part] = I::fma(v, weights[i], sums[i * parts + Part]);
    add_part<I, S, Queries, Part + 1>(raw, weights, step, minimum, sums, parts);
  }
}

// Steps and minima of values, [keys, groups] of `channels` numbers each.
struct ValueGrid {
  const float *steps, *minima;
  int64_t groups, channels;
};

// A vector of a load at `at`, of which each half lies within a group.
template <class I, int Per>
inline typename I::F over_groups(const float* numbers, int64_t at, int64_t channels) {
  const int64_t upper = (at + I::kLanes / 2 * Per) / channels;
  return at / channels == upper ? I::set(numbers[upper]) : I::halves(numbers[at / channels], numbers[upper]);
}

// sums[q][from on] += weights[q] @ values, for Steps loads of columns.
template <class I, class S, int Queries, int Steps>
inline void add_columns(const uint8_t* values, int64_t from, int64_t count, const float* weights, int64_t room,
                        int64_t width, const ValueGrid& grid, float* sums) {
  constexpr int kParts = Steps * S::kPer;
  const int64_t stride = S::bytes(width);
  typename I::F own[Queries * kParts];
  for (int i = 0; i < Queries; ++i)
    for (int part = 0; part < kParts; ++part) own[i * kParts + part] = I::load(sums + i * width + from + part * I::kLanes);
  for (int64_t key = 0; key < count; ++key) {
    typename I::F w[Queries];
    for (int i = 0; i < Queries; ++i) w[i] = I::set(weights[i * room + key]);
    for (int load = 0; load < Steps; ++load) {
      const int64_t at = from + load * I::kLanes * S::kPer;
      const typename S::Raw raw = S::load(values + key * stride + S::bytes(at));
      typename I::F step = I::zero(), minimum = I::zero();
      if (S::kCoded) {
        step = over_groups<I, S::kPer>(grid.steps + key * grid.groups, at, grid.channels);
        minimum = over_groups<I, S::kPer>(grid.minima + key * grid.groups, at, grid.channels);
      }
      add_part<I, S, Queries, 0>(raw, w, step, minimum, own + load * S::kPer, kParts);
    }
  }
  for (int i = 0; i < Queries; ++i)
    for (int part = 0; part < kParts; ++part) I::store(sums + i * width + from + part * I::kLanes, own[i * kParts + part]);
}

template <class I, class S, int Queries>
inline void add_values(const uint8_t* values, int64_t count, const float* weights, int64_t room, int64_t width,
                       const ValueGrid& grid, float* sums) {
  constexpr int kFitting = I::kTile / ((Queries > 2 ? 4 : Queries) * S::kPer);
  constexpr int kSteps = kFitting > 8 ? 8 : kFitting > 0 ? kFitting : 1;
  constexpr int64_t kLoad = I::kLanes * S::kPer;
  int64_t from = 0;
  for (; from + kSteps * kLoad <= width; from += kSteps * kLoad)
    add_columns<I, S, Queries, kSteps>(values, from, count, weights, room, width, grid, sums);
  for (; from < width; from += kLoad)
    add_columns<I, S, Queries, 1>(values, from, count, weights, room, width, grid, sums);
}

template <class I, class S>
inline void add_all_values(const uint8_t* values, int64_t count, const float* weights, int64_t packed, int64_t room,
                           int64_t width, const ValueGrid& grid, float* sums) {
  int64_t i = 0;
  for (; i + 4 <= packed; i += 4)
    add_values<I, S, 4>(values, count, weights + i * room, room, width, grid, sums + i * width);
  if (packed - i == 3) add_values<I, S, 3>(values, count, weights + i * room, room, width, grid, sums + i * width);
  if (packed - i == 2) add_values<I, S, 2>(values, count, weights + i * room, room, width, grid, sums + i * width);
  if (packed - i == 1) add_values<I, S, 1>(values, count, weights + i * room, room, width, grid, sums + i * width);
}

// -infinity for slots that a query does not see.
inline void hide(const Slice& slice, int64_t slot, int64_t count, float* logits) {
  const SparityReading& of = slice.reading;
  const uint8_t* visible = of.visible ? of.visible + slice.row * of.length : nullptr;
  for (int64_t i = 0; i < slice.packed; ++i) {
    const int64_t own = of.length - of.fresh + (slice.first + i) % of.fresh;
    for (int64_t at = 0; at < count; ++at) {
      const int64_t place = slice.slots.places[slot + at];
      const bool seen = place >= 0 && place <= own && (!of.window || place > own - of.window) && (!visible || visible[place]);
      if (!seen) logits[i * kSlice + at] = -INFINITY;
    }
  }
}

// Products of a run's keys become logits.
inline void finish_logits(const Slice& slice, int64_t slot, int64_t count, float* logits) {
  const SparityReading& of = slice.reading;
  for (int64_t i = 0; i < slice.packed; ++i) {
    float* own = logits + i * kSlice;
    for (int64_t at = 0; at < count; ++at) own[at] *= of.scale;
    for (int64_t at = 0; of.cap != 0 && at < count; ++at) own[at] = of.cap * tanhf(own[at] / of.cap);
    for (int64_t at = 0; slice.slots.added && at < count; ++at) own[at] += slice.slots.added[slot + at];
  }
  if (slice.slots.places) hide(slice, slot, count, logits);
}

// Logits become e^(logit - highest).
inline void weigh(float* logits, int64_t count, float& highest, float& total) {
  float best = -INFINITY;
  for (int64_t at = 0; at < count; ++at) best = logits[at] > best ? logits[at] : best;
  for (int64_t at = 0; at < count; ++at) {
    const float weight = exponential(logits[at] - best);
    logits[at] = logits[at] == -INFINITY ? 0.0f : weight;
  }
  float parts[16] = {};
  int64_t at = 0;
  for (; at + 16 <= count; at += 16)
    for (int i = 0; i < 16; ++i) parts[i] += logits[at + i];
  for (int i = 0; at + i < count; ++i) parts[i] += logits[at + i];  // so that slots that are not seen change no bit
  float sum = 0;
  for (int i = 0; i < 16; ++i) sum += parts[i];
  highest = best;
  total = sum;
}

// Where the numbers of keys or values meet a grid: codes of keys by channel, of values by token.
template <class I, class S>
inline Grid key_grid(const Slice& slice, const Run& run, float* plain, float* room) {
  const int64_t width = slice.reading.width;
  if (!S::kCoded) return {};
  numbers_at(slice.slots.key_steps, slice.slots.type, run.group * width, width, plain);
  spread<I, S::kPer>(plain, width, room);
  numbers_at(slice.slots.key_minima, slice.slots.type, run.group * width, width, plain);
  spread<I, S::kPer>(plain, width, room + width);
  return {room, room + width};
}

template <class I, class K, class V>
void attend_slice(const Slice& slice, const Found& found) {
  const SparityReading& of = slice.reading;
  const int64_t width = of.width, value_width = of.value_width, packed = slice.packed;
  alignas(64) float plain[kMostHeadWidth], queries[kPack * kMostHeadWidth], sums[kPack * kMostHeadWidth];
  alignas(64) float logits[kPack * kSlice], grid_room[2 * kMostHeadWidth];
  for (int64_t i = 0; i < packed; ++i) {
    numbers_at(slice.queries, of.type, i * width, width, plain);
    spread<I, K::kPer>(plain, width, queries + i * width);
  }
  const auto* keys = static_cast<const uint8_t*>(slice.slots.keys);
  const auto* values = static_cast<const uint8_t*>(slice.slots.values);
  int64_t filled = 0;
  for (int64_t r = 0; r < slice.count; ++r) {
    const Run& run = slice.runs[r];
    const Grid grid = key_grid<I, K>(slice, run, plain, grid_room);
    for (int64_t at = 0; at < run.count; at += kStretch) {
      const int64_t now = run.count - at < kStretch ? run.count - at : kStretch;
      all_dots<I, K>(keys + (run.slot + at) * K::bytes(width), now, queries, packed, width, grid, logits + filled + at, kSlice);
    }
    finish_logits(slice, run.slot, run.count, logits + filled);
    filled += run.count;
  }
  for (int64_t i = 0; i < packed; ++i) weigh(logits + i * kSlice, filled, found.highest[i], found.total[i]);
  for (int64_t i = 0; i < packed * value_width; ++i) sums[i] = 0;
  const int64_t groups = V::kCoded ? value_width / slice.slots.channels : 0;
  alignas(64) float steps[kStretch * kMostHeadWidth / 8], minima[kStretch * kMostHeadWidth / 8];
  filled = 0;
  for (int64_t r = 0; r < slice.count; ++r) {
    const Run& run = slice.runs[r];
    for (int64_t at = 0; at < run.count; at += kStretch) {
      const int64_t now = run.count - at < kStretch ? run.count - at : kStretch, slot = run.slot + at;
      if (V::kCoded) {
        numbers_at(slice.slots.value_steps, slice.slots.type, slot * groups, now * groups, steps);
        numbers_at(slice.slots.value_minima, slice.slots.type, slot * groups, now * groups, minima);
      }
      const ValueGrid grid = {steps, minima, groups, slice.slots.channels};
      add_all_values<I, V>(values + slot * V::bytes(value_width), now, logits + filled + at, packed, kSlice,
                           value_width, grid, sums);
    }
    filled += run.count;
  }
  for (int64_t i = 0; i < packed; ++i) gather<I, V::kPer>(sums + i * value_width, value_width, found.sums + i * value_width);
}

template <class I>
void attend_slots(const Slice& slice, const Found& found) {
  switch (slice.slots.bits) {
    case 8: return attend_slice<I, Codes<I, 8>, Codes<I, 8>>(slice, found);
    case 4: return attend_slice<I, Codes<I, 4>, Codes<I, 4>>(slice, found);
    case 2: return attend_slice<I, Codes<I, 2>, Codes<I, 2>>(slice, found);
  }
  if (slice.slots.type == SPARITY_FLOAT32) return attend_slice<I, Floats32<I>, Floats32<I>>(slice, found);
  attend_slice<I, Floats16<I>, Floats16<I>>(slice, found);
}

#include "attention_pages.h"

template <class I>
constexpr sparity::AttentionKernels attention_kernels() {
  return {I::kLanes, attend_slots<I>, judge<I>};
}

}  // namespace
