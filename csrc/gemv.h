// The loops of every kernel, over an instruction set `Isa`:
//   Floats  32 bfloat16 weights ready to multiply;    Sum  float32 partial sums;    X  one prepared input
//   Bytes   64 int8 weights ready to multiply;        Total  int32 partial sums;    Q  one prepared input
//   Fours   what int4 weights need, see nibbles.h
// Everything has internal linkage, because each instruction set compiles it with other flags.
#pragma once

#include <math.h>

#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "numbers.h"

namespace {

using sparity::Inputs;
using sparity::kGroup;
using sparity::kSideBySide;
using sparity::kTileRows;
using sparity::Outputs;

constexpr int64_t kAhead = 9216;       // bytes that a sequential stream is fetched ahead
constexpr int64_t kAheadOfRow = 1536;  // and each of several rows that are read side by side

inline void store(const Outputs& out, int64_t at, float value) {
  if (out.wide)
    static_cast<float*>(out.y)[at] = value;
  else
    static_cast<uint16_t*>(out.y)[at] = to_bfloat16(value);
}

// `sum` is that of the products with inputs shifted by Isa::kShift.
template <class Isa>
inline void store_scaled(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t token, int64_t row,
                         int64_t sum) {
  const int64_t exact = Isa::kShift ? sum - Isa::kShift * int64_t(weight.row_sums[row]) : sum;
  const double scale = double(weight.scales[row]) * double(in.scales[token]);
  store(out, token * weight.rows + row, float(double(exact) * scale));
}

// The last tile or row of blocks may reach beyond the matrix.
inline void store_inside(const SparityMatrix& weight, const Outputs& out, int64_t token, int64_t row, float value) {
  if (row < weight.rows) store(out, token * weight.rows + row, value);
}

inline void store_all(const Outputs& out, int64_t at, const float* values, int64_t count) {
  if (out.wide) {
    memcpy(static_cast<float*>(out.y) + at, values, size_t(count) * sizeof(float));
  } else {
    for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(out.y)[at + i] = to_bfloat16(values[i]);
  }
}

#include "sources.h"

// ---- one tile times `Tokens` inputs

template <class Isa, int Tokens, class Source>
inline void tile_floats(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t token, int64_t tile,
                        Source source) {
  using X = typename Isa::X;
  const int64_t groups = (weight.columns + kGroup - 1) / kGroup;
  const X* x = static_cast<const X*>(in.x) + token * in.stride;
  typename Isa::Sum sums[kTileRows][Tokens] = {};
  const auto add = [&](int64_t group, bool room) __attribute__((always_inline)) {
    source.ahead(2);
#pragma GCC unroll 4
    for (int row = 0; row < kTileRows; ++row) {
      typename Isa::Floats low, high;
      source.floats(group, row, room, low, high);
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) {
        const X* at = x + t * in.stride + group * kGroup;
        sums[row][t] = Isa::multiply(sums[row][t], low, at);
        sums[row][t] = Isa::multiply(sums[row][t], high, at + 32);
      }
    }
  };
  int64_t group = 0;
  for (; group < groups && source.has_room(2); ++group) add(group, true);
  for (; group < groups; ++group) add(group, false);
  float results[kTileRows][Tokens];
#pragma GCC unroll 4
  for (int row = 0; row < kTileRows; ++row)
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) results[row][t] = Isa::sum(sums[row][t]);
  for (int row = 0; row < kTileRows; ++row)
    for (int t = 0; t < Tokens; ++t) store_inside(weight, out, token + t, tile * kTileRows + row, results[row][t]);
}

template <class Isa, int Tokens, class Source>
inline void tile_bytes(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t token, int64_t tile,
                       Source source) {
  using Q = typename Isa::Q;
  const int64_t groups = (weight.columns + kGroup - 1) / kGroup;
  const Q* x = static_cast<const Q*>(in.x) + token * in.stride;
  typename Isa::Total totals[kTileRows][Tokens] = {};
  const auto add = [&](int64_t group, bool room) __attribute__((always_inline)) {
    source.ahead(1);
#pragma GCC unroll 4
    for (int row = 0; row < kTileRows; ++row) {
      const typename Isa::Bytes weights = source.bytes(group, row, room);
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t)
        totals[row][t] = Isa::multiply(totals[row][t], weights, x + t * in.stride + group * kGroup);
    }
  };
  int64_t group = 0;
  for (; group < groups && source.has_room(1); ++group) add(group, true);
  for (; group < groups; ++group) add(group, false);
  int64_t results[kTileRows][Tokens];
#pragma GCC unroll 4
  for (int row = 0; row < kTileRows; ++row)
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) results[row][t] = Isa::total(totals[row][t]);
  for (int row = 0; row < kTileRows && tile * kTileRows + row < weight.rows; ++row)
    for (int t = 0; t < Tokens; ++t)
      store_scaled<Isa>(weight, in, out, token + t, tile * kTileRows + row, results[row][t]);
}

template <class Isa, int Tokens, class Source>
inline void tile_tokens(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t token, int64_t tile,
                        const Source& source) {
  if (weight.scales)
    tile_bytes<Isa, Tokens>(weight, in, out, token, tile, source);
  else
    tile_floats<Isa, Tokens>(weight, in, out, token, tile, source);
}

template <class Isa, class Source>
inline void tile_all_tokens(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t tokens,
                            int64_t tile) {
  const Source source(weight, tile, weight.scales ? 1 : 2);
  int64_t token = 0;
  for (; token + 4 <= tokens; token += 4) tile_tokens<Isa, 4>(weight, in, out, token, tile, source);
  if (tokens - token == 3) tile_tokens<Isa, 3>(weight, in, out, token, tile, source);
  if (tokens - token == 2) tile_tokens<Isa, 2>(weight, in, out, token, tile, source);
  if (tokens - token == 1) tile_tokens<Isa, 1>(weight, in, out, token, tile, source);
}

#include "block.h"
#include "nibbles.h"

#include "columns.h"

#include "dense.h"

template <class Isa>
void gemv(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t tokens, int64_t begin,
          int64_t end) {
  if (weight.format == SPARITY_COLUMNS) return columns<Isa>(weight, in, out, tokens, begin, end);
  if (weight.group) return fours<Isa>(weight, in, out, tokens, begin, end);
  for (int64_t unit = begin; unit < end; ++unit) {
    switch (weight.format) {
      case SPARITY_DENSE:
        dense_tile<Isa>(weight, in, out, tokens, unit);
        break;
      case SPARITY_TWO_OF_FOUR:
        tile_all_tokens<Isa, Paired<Isa>>(weight, in, out, tokens, unit);
        break;
      case SPARITY_BITMASK:
        tile_all_tokens<Isa, Masked<Isa>>(weight, in, out, tokens, unit);
        break;
      default:
        block_row<Isa>(weight, in, out, tokens, unit);
    }
  }
}

// ---- unpacking

template <class Isa, class Source>
inline void unpack_from(const SparityMatrix& weight, int64_t tile, int64_t rows, void* out) {
  const int64_t element = weight.scales ? 1 : 2, columns = weight.columns;
  Source source(weight, tile, element);
  for (int64_t group = 0; group * kGroup < columns; ++group) {
    const int64_t width = columns - group * kGroup < kGroup ? columns - group * kGroup : kGroup;
    const bool room = source.has_room(element);
    source.ahead(int(element));
    for (int row = 0; row < kTileRows; ++row) {  // also rows beyond the end: a stream must be read on
      char copy[kGroup * 2];
      char* at = static_cast<char*>(out) + (row * columns + group * kGroup) * element;
      char* to = row < rows && width == kGroup ? at : copy;
      if (weight.scales) {
        Isa::store_bytes(source.bytes(group, row, room), reinterpret_cast<int8_t*>(to));
      } else {
        typename Isa::Floats low, high;
        source.floats(group, row, room, low, high);
        Isa::store_floats(low, reinterpret_cast<uint16_t*>(to));
        Isa::store_floats(high, reinterpret_cast<uint16_t*>(to) + 32);
      }
      if (row < rows && to == copy) memcpy(at, copy, size_t(width * element));
    }
  }
}

template <class Isa>
void unpack_tile(const SparityMatrix& weight, int64_t tile, int64_t rows, void* out) {
  if (weight.group) return unpack_fours<Isa>(weight, tile, rows, static_cast<uint16_t*>(out));
  if (weight.format == SPARITY_TWO_OF_FOUR)
    unpack_from<Isa, Paired<Isa>>(weight, tile, rows, out);
  else
    unpack_from<Isa, Masked<Isa>>(weight, tile, rows, out);
}

template <class Isa, class Source>
inline void sums_from(const SparityMatrix& weight, int64_t tile, int64_t sums[kTileRows]) {
  Source source(weight, tile, 1);
  for (int64_t group = 0; group * kGroup < weight.columns; ++group) {
    const bool room = source.has_room(1);
    for (int row = 0; row < kTileRows; ++row) {
      int8_t values[kGroup];
      Isa::store_bytes(source.bytes(group, row, room), values);
      for (int8_t value : values) sums[row] += value;
    }
  }
}

template <class Isa>
void row_sums(const SparityMatrix& weight, int64_t tile, int64_t sums[kTileRows]) {
  for (int row = 0; row < kTileRows; ++row) sums[row] = 0;
  if (weight.format == SPARITY_BITMASK) return sums_from<Isa, Masked<Isa>>(weight, tile, sums);
  if (weight.format == SPARITY_TWO_OF_FOUR) return sums_from<Isa, Paired<Isa>>(weight, tile, sums);
  const int64_t first = tile * kTileRows;
  for (int64_t row = first; row < first + kTileRows && row < weight.rows; ++row)
    for (int64_t column = 0; column < weight.columns; ++column)
      sums[row - first] += static_cast<const int8_t*>(weight.values)[row * weight.columns + column];
}

// ---- inputs

template <class Isa>
void prepare_floats(const uint16_t* x, int64_t columns, int64_t stride, void* out) {
  auto* to = static_cast<typename Isa::X*>(out);
  for (int64_t column = 0; column < columns; ++column) to[column] = Isa::input(x[column]);
  for (int64_t column = columns; column < stride; ++column) to[column] = 0;
}

template <class Isa>
void prepare_ints(const int8_t* x, int64_t columns, int64_t stride, void* out) {
  auto* to = static_cast<typename Isa::Q*>(out);
  for (int64_t column = 0; column < columns; ++column) to[column] = typename Isa::Q(x[column] + Isa::kShift);
  for (int64_t column = columns; column < stride; ++column) to[column] = 0;
}

// Plain loops, which the compiler makes into vectors of each instruction set.
inline void quantize(const uint16_t* x, int64_t columns, int8_t* out, float* scale) {
  constexpr float kSmallestNormal = 1.17549435e-38f;
  int32_t largest = 0;  // bfloat16 without its sign is ordered like a whole number
  for (int64_t column = 0; column < columns; ++column) {
    const int32_t size = x[column] & 0x7fff;
    largest = size > largest ? size : largest;
  }
  if (largest >= 0x7f80) {  // infinity or NaN
    memset(out, 0, size_t(columns));
    *scale = NAN;
    return;
  }
  float step = to_float(uint16_t(largest)) / 127.0f;
  if (step < kSmallestNormal) step = largest ? kSmallestNormal : 1.0f;
  for (int64_t column = 0; column < columns; ++column)
    out[column] = int8_t(int32_t(rintf(to_float(x[column]) / step)));
  *scale = step;
}

// In four independent sums, which the compiler makes into vectors.
inline uint64_t read(const uint64_t* words, int64_t count) {
  uint64_t sums[32] = {};
  int64_t at = 0;
  for (; at + 32 <= count; at += 32) {
    for (int line = 0; line < 4; ++line) __builtin_prefetch(words + at + kAhead / 8 + 8 * line);
    for (int i = 0; i < 32; ++i) sums[i] += words[at + i];
  }
  for (; at < count; ++at) sums[0] += words[at];
  uint64_t sum = 0;
  for (uint64_t part : sums) sum += part;
  return sum;
}

template <class Isa>
constexpr sparity::Kernels kernels() {
  return {sizeof(typename Isa::X), sizeof(typename Isa::Q), prepare_floats<Isa>, prepare_ints<Isa>,
          quantize,                prepare_fours<Isa>,      read,                gemv<Isa>,
          dense_listed<Isa>,       unpack_tile<Isa>,        row_sums<Isa>};
}

}  // namespace
