// Weights by input channel, [columns, rows]: channels whose input is zero for all tokens are never read. The channels are
// cut into ranges by their number (`Inputs::parts`). Within a range, a row's sum takes its token's other channels one
// after another; the ranges are added in their order. So its bits depend on neither tiles, threads nor other tokens.
// Included by gemv.h inside its namespace. `Kind` is what a type of values does:
//   Sum, kLine            of a row; rows in one cache line, which are added at a time
//   place<Isa>(row)       where the sum of a row of a line lies, in the order that is cheapest to compute
//   add<Isa>(...)         sums [tokens, width] += the channels of a range, for the rows of a tile
//   store<Isa>(...)       one token's totals, in the order of rows -> y

using sparity::kChannels;

// The lines of channels that are read next, on their way into the second cache.
template <class Value, int Count>
struct Next {
  const Value* channels[Count];
  bool any;

  inline void fetch(int64_t row) const {
#pragma GCC unroll 16
    for (int i = 0; i < Count; ++i) __builtin_prefetch(channels[i] + row, 0, 2);
  }
};

// The channels of a range, up to `end` of the list, for a tile that begins at `row`; `Count` at a time.
template <class Value, int Count>
struct Channels {
  const Value* first;
  int64_t rows, end;
  const Inputs& in;

  Channels(const SparityMatrix& weight, const Inputs& inputs, int64_t last, int64_t row)
      : first(static_cast<const Value*>(weight.values) + row), rows(weight.rows), end(last), in(inputs) {}

  inline const Value* at(int64_t number) const { return first + in.channels[number] * rows; }
  inline int in_group(int64_t group) const { return int(end - group < Count ? end - group : Count); }
  inline Next<Value, Count> behind(int64_t group) const {
    Next<Value, Count> next;
    next.any = group + Count < end;
    for (int i = 0; i < Count; ++i) {
      const int64_t number = group + Count + i;
      next.channels[i] = at(number < end ? number : end - 1);
    }
    return next;
  }
};

inline int64_t whole_lines(int64_t rows, int64_t line) { return (rows + line - 1) / line * line; }

#include "columns_bytes.h"
#include "columns_floats.h"
#include "columns_fours.h"

// Sums as they were computed -> out [rows], in the order of rows.
template <class Isa, class Kind>
inline void in_order(const typename Kind::Sum* sums, int64_t rows, typename Kind::Sum* out) {
  for (int64_t line = 0; line < rows; line += Kind::kLine) {
    typename Kind::Sum ordered[Kind::kLine];
#pragma GCC unroll 64
    for (int i = 0; i < Kind::kLine; ++i) ordered[i] = sums[line + Kind::template place<Isa>(i)];
    const int64_t left = rows - line < Kind::kLine ? rows - line : Kind::kLine;
    memcpy(out + line, ordered, size_t(left) * sizeof(typename Kind::Sum));
  }
}

// Where the sums of a range for a token and a tile wait for the others; the tile has whole lines.
template <class Sum>
inline Sum* waiting(const SparityMatrix& weight, const Inputs& in, int64_t tokens, int64_t part, int64_t token,
                    int64_t row) {
  const int64_t rows = whole_lines(weight.rows, sparity::kMostLine);
  return static_cast<Sum*>(in.partial) + (part * tokens + token) * rows + row;
}

template <class Isa, class Kind>
void columns_tile(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t tokens, int64_t part,
                  int64_t row, int64_t rows) {
  using Sum = typename Kind::Sum;
  alignas(64) Sum sums[sparity::kMostSums];
  alignas(64) Sum totals[sparity::kMostRows];
  const int64_t width = whole_lines(rows, Kind::kLine);
  const auto store = [&](const Sum* from, int64_t token) {
    in_order<Isa, Kind>(from, rows, totals);
    Kind::template store<Isa>(weight, in, out, tokens, token, row, rows, totals);
  };
  for (int64_t token = 0; token < tokens; token += sparity::kMostTokens) {
    const int64_t now = tokens - token < sparity::kMostTokens ? tokens - token : sparity::kMostTokens;
    memset(sums, 0, size_t(now * width) * sizeof(Sum));
    Kind::template add<Isa>(weight, in, part, token, now, row, rows, sums);
    for (int64_t t = 0; t < now; ++t) {
      if (in.parts == 1)
        store(sums + t * width, token + t);
      else
        memcpy(waiting<Sum>(weight, in, tokens, part, token + t, row), sums + t * width, size_t(width) * sizeof(Sum));
    }
  }
  if (in.parts == 1 || __atomic_add_fetch(in.done + row / in.tile_rows, 1, __ATOMIC_ACQ_REL) < in.parts) return;
  for (int64_t token = 0; token < tokens; ++token) {  // the last range of this tile is there
    memcpy(sums, waiting<Sum>(weight, in, tokens, 0, token, row), size_t(width) * sizeof(Sum));
    for (int64_t other = 1; other < in.parts; ++other) {
      const Sum* more = waiting<Sum>(weight, in, tokens, other, token, row);
      for (int64_t i = 0; i < width; ++i) sums[i] = Kind::plus(sums[i], more[i]);
    }
    store(sums, token);
  }
}

// The tiles of each range that begin within units [begin, end): 4 rows of a range are a unit.
template <class Isa>
void columns(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t tokens, int64_t begin,
             int64_t end) {
  const int64_t size = in.tile_rows, units = (weight.rows + kTileRows - 1) / kTileRows;
  for (int64_t part = begin / units; part * units < end; ++part) {
    const int64_t from = begin > part * units ? begin - part * units : 0;
    const int64_t to = end < (part + 1) * units ? end - part * units : units;
    const int64_t last = to * kTileRows < weight.rows ? to * kTileRows : weight.rows;
    for (int64_t row = (from * kTileRows + size - 1) / size * size; row < last; row += size) {
      const int64_t rows = weight.rows - row < size ? weight.rows - row : size;
      if (weight.group)
        columns_tile<Isa, FourColumns>(weight, in, out, tokens, part, row, rows);
      else if (weight.scales)
        columns_tile<Isa, ByteColumns>(weight, in, out, tokens, part, row, rows);
      else
        columns_tile<Isa, FloatColumns>(weight, in, out, tokens, part, row, rows);
    }
  }
}
