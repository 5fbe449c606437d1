// Attention of a prompt by blocks: tiles of keys, packed so that products of queries and keys, and of weights and values,
// are the same product of 4 rows with a panel. Softmax goes from tile to tile. Templates over what multiplies, M:
//   Number, kStep          a packed number, and how many of them meet in one lane at a time
//   kVectors               vectors of sums for each of 4 rows that stay in registers
//   read, put              Numbers from memory; a vector as Numbers
//   multiply               sums + panel * pair
// Everything has internal linkage, as each file is compiled for another processor.
#pragma once

#include <math.h>
#include <string.h>

#include "attention_blocks_kernels.h"
#include "attention_sources.h"
#include "exponential.h"

namespace {

using sparity::BlockTask;
using sparity::kTileKeys;
using sparity::kTileQueries;

constexpr int kRows = 4;  // queries whose sums stay in registers

template <class Vectors>
struct FloatPanels : Vectors {
  using F = typename Vectors::F;
  using Number = float;
  static constexpr int kStep = 1;
  static inline F panel(const float* from) { return Vectors::load(from); }
  static inline F pair(const float* from) { return Vectors::set(*from); }
  static inline F multiply(const F& sums, const F& panel, const F& pair) { return Vectors::fma(panel, pair, sums); }
  static inline void put(const F& x, float* to) { Vectors::store(to, x); }
  static inline void read(const void* from, int32_t type, int64_t at, int64_t count, float* to) {
    numbers_at(from, type, at, count, to);
  }
};

// sums[row][column] = shares[row] * sums[row][column] (0 without shares) + rows[row] @ panel, for Count vectors of columns
// of a panel [steps, columns, kStep].
template <class M, int Count>
inline void multiply_panel(const typename M::Number* rows, int64_t row_stride, const typename M::Number* panel,
                           int64_t columns, int64_t steps, const float* shares, float* sums, int64_t sums_stride) {
  typename M::F own[kRows][Count];
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < Count; ++v) {
      own[i][v] = M::zero();
      if (shares) own[i][v] = M::fma(M::load(sums + i * sums_stride + v * M::kLanes), M::set(shares[i]), own[i][v]);
    }
  for (int64_t step = 0; step < steps; ++step) {
    typename M::F part[Count];
    for (int v = 0; v < Count; ++v) part[v] = M::panel(panel + (step * columns + v * M::kLanes) * M::kStep);
    for (int i = 0; i < kRows; ++i) {
      const typename M::F pair = M::pair(rows + i * row_stride + step * M::kStep);
      for (int v = 0; v < Count; ++v) own[i][v] = M::multiply(own[i][v], part[v], pair);
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < Count; ++v) M::store(sums + i * sums_stride + v * M::kLanes, own[i][v]);
}

// The same for the first `used` columns.
template <class M>
inline void multiply_rows(const typename M::Number* rows, int64_t row_stride, const typename M::Number* panel,
                          int64_t columns, int64_t used, int64_t steps, const float* shares, float* sums,
                          int64_t sums_stride) {
  constexpr int64_t kWide = M::kVectors * M::kLanes;
  int64_t at = 0;
  for (; at + kWide <= used; at += kWide)
    multiply_panel<M, M::kVectors>(rows, row_stride, panel + at * M::kStep, columns, steps, shares, sums + at, sums_stride);
  for (; at < used; at += M::kLanes)
    multiply_panel<M, 1>(rows, row_stride, panel + at * M::kStep, columns, steps, shares, sums + at, sums_stride);
}

// e^r for |r| <= ln(2) / 2, within two units in the last place.
template <class I>
inline typename I::F power(typename I::F r) {
  typename I::F p = I::set(1.9875691500e-4f);
  for (float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f, 1.0f, 1.0f})
    p = I::fma(p, r, I::set(next));
  return p;
}

// Logits become weights e^(logit - highest); `used` is a multiple of 16, and logits from `seen` on are not seen.
template <class M>
inline void weigh_row(const SparityBlockAttention& of, float* logits, int64_t used, int64_t seen, float& highest,
                      float& total, float& share, typename M::Number* weights) {
  const typename M::F scale = M::set(of.cap != 0 ? 1.0f : of.scale);
  for (int64_t at = 0; of.cap != 0 && at < seen; ++at) logits[at] = of.cap * tanhf(logits[at] * of.scale / of.cap);
  typename M::F best = M::set(-INFINITY);
  for (int64_t at = 0; at < used; at += M::kLanes) {
    typename M::F row = M::fma(M::load(logits + at), scale, M::zero());
    if (at + M::kLanes > seen) row = M::first(row, seen - at, -INFINITY);
    best = M::larger(row, best);
  }
  const float before = highest, now = M::largest(best);
  highest = now > before ? now : before;
  const float base = highest == -INFINITY ? 0.0f : highest;  // where nothing is seen yet
  share = before == highest ? 1.0f : exponential(before - base);
  const typename M::F less = M::set(-base);
  typename M::F sum = M::zero();
  for (int64_t at = 0; at < used; at += M::kLanes) {
    typename M::F row = M::exponential(M::fma(M::load(logits + at), scale, less));
    if (at + M::kLanes > seen) row = M::first(row, seen - at, 0.0f);
    sum = M::add(sum, row);
    M::put(row, weights + at);
  }
  total = total * share + M::total(sum);
}

// Four queries, the first at `place`, meet `count` keys, the first of which is number `first`.
template <class M>
inline void meet_tile(const SparityBlockAttention& of, const typename M::Number* queries, const char* packed, int64_t place,
                      int64_t first, int64_t count, float* highest, float* totals, float* sums) {
  using Number = typename M::Number;
  const int64_t room = tile_room(of), last = place + kRows - 1 - first + 1;  // keys that the last of them sees
  const int64_t needed = last < count ? last : count;
  if (needed <= 0) return;
  const int64_t used = (needed + 15) / 16 * 16;
  const auto* keys = reinterpret_cast<const Number*>(packed);
  const Number* values = keys + room * of.width;
  alignas(64) float logits[kRows * kTileKeys];
  alignas(64) Number weights[kRows * kTileKeys];
  float shares[kRows];
  multiply_rows<M>(queries, of.width, keys, room, used, of.width / M::kStep, nullptr, logits, kTileKeys);
  for (int i = 0; i < kRows; ++i) {
    const int64_t own = place + i - first + 1, visible = own < 0 ? 0 : own < needed ? own : needed;
    weigh_row<M>(of, logits + i * kTileKeys, used, visible, highest[i], totals[i], shares[i], weights + i * kTileKeys);
  }
  multiply_rows<M>(weights, kTileKeys, values, of.value_width, of.value_width, used / M::kStep, shares, sums,
                   of.value_width);
}

template <class M>
void attend_block(const BlockTask& task, char* room) {
  using Number = typename M::Number;
  const SparityBlockAttention& of = task.of;
  const int64_t padded = (task.count + kRows - 1) / kRows * kRows;
  auto* sums = reinterpret_cast<float*>(room);
  auto* queries = reinterpret_cast<Number*>(sums + kTileQueries * of.value_width);
  float highest[kTileQueries], totals[kTileQueries];
  for (int64_t i = 0; i < padded; ++i) {
    if (i < task.count) M::read(task.queries.at, of.type, i * task.queries.stride, of.width, queries + i * of.width);
    else memset(queries + i * of.width, 0, size_t(of.width) * sizeof(Number));
    highest[i] = task.drain ? *task.drain : -INFINITY;
    totals[i] = task.drain && *task.drain != -INFINITY ? 1.0f : 0.0f;
  }
  memset(sums, 0, size_t(padded * of.value_width) * 4);
  const int64_t bytes = tile_numbers(of) * int64_t(sizeof(Number)), tiles = tiles_of_block(of);
  for (int64_t block = 0; block * of.key_block < task.keys && block * of.key_block < task.place + task.count; ++block) {
    if (!task.kept[block]) continue;
    const int64_t end = (block + 1) * of.key_block < task.keys ? (block + 1) * of.key_block : task.keys;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = block * of.key_block + tile * kTileKeys;
      const int64_t count = end - first < kTileKeys ? end - first : kTileKeys;
      for (int64_t i = 0; i < padded && count > 0; i += kRows)
        meet_tile<M>(of, queries + i * of.width, task.packed + (block * tiles + tile) * bytes, task.place + i, first, count,
                     highest + i, totals + i, sums + i * of.value_width);
    }
  }
  for (int64_t i = 0; i < task.count; ++i)
    for (int64_t at = 0; at < of.value_width; ++at) {
      const float value = totals[i] == 0 ? 0.0f : sums[i * of.value_width + at] / totals[i];
      if (of.type == SPARITY_FLOAT32) static_cast<float*>(task.out)[i * task.out_stride + at] = value;
      else static_cast<uint16_t*>(task.out)[i * task.out_stride + at] = to_bfloat16(value);
    }
}

template <class M>
void pack_tile(const SparityBlockAttention& of, sparity::Tokens keys, sparity::Tokens values, int64_t count,
               const sparity::PackedTile& into) {
  using Number = typename M::Number;
  auto* own_keys = static_cast<Number*>(into.keys);
  auto* own_values = static_cast<Number*>(into.values);
  const int64_t room = tile_room(of);
  memset(own_keys, 0, size_t(tile_numbers(of)) * sizeof(Number));
  alignas(64) Number row[512];
  for (int64_t key = 0; key < count; ++key) {
    M::read(keys.at, of.type, key * keys.stride, of.width, row);
    for (int64_t at = 0; at < of.width; at += M::kStep)
      memcpy(own_keys + at * room + key * M::kStep, row + at, M::kStep * sizeof(Number));
    M::read(values.at, of.type, key * values.stride, of.value_width, row);
    Number* into = own_values + key / M::kStep * of.value_width * M::kStep + key % M::kStep;
    for (int64_t at = 0; at < of.value_width; ++at) into[at * M::kStep] = row[at];
  }
}

template <class M>
constexpr sparity::BlockKernels block_kernels() {
  return {sizeof(typename M::Number), M::kStep, pack_tile<M>, attend_block<M>};
}

}  // namespace
