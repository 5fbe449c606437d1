// Weights by input channel, [columns, rows]: channels whose input is zero for all tokens are never read. A row's sum
// takes its token's other channels one after another, so its bits depend on neither tiles, threads nor other tokens.
// Included by gemv.h inside its namespace.

using sparity::kChannels;

constexpr int64_t kFloatLine = 32, kByteLine = 64;  // rows in one cache line, which are added at a time

// Where the sum of a row of a line lies: instruction sets whose vectors have `Vector` bytes leave pairs of bfloat16, and
// fours of int8, in the order in which it is cheapest to take them apart.
template <int Vector>
constexpr int64_t float_place(int64_t row) {
  constexpr int64_t pairs = Vector / 4;
  return row / (2 * pairs) * (2 * pairs) + row % 2 * pairs + row % (2 * pairs) / 2;
}
template <int Vector>
constexpr int64_t byte_place(int64_t row) {
  return row / Vector * Vector + row % 16 / 4 * (Vector / 4) + row % Vector / 16 * 4 + row % 4;
}

// The lines of channels that are read next, on their way into the second cache.
template <class Value>
struct Next {
  const Value* channels[kChannels];
  bool any;

  inline void fetch(int64_t row) const {
#pragma GCC unroll 8
    for (int i = 0; i < kChannels; ++i) __builtin_prefetch(channels[i] + row, 0, 2);
  }
};

// The channels of a tile that begins at `row`, in groups.
template <class Value>
struct Channels {
  const Value* first;
  int64_t rows;
  const Inputs& in;

  Channels(const SparityMatrix& weight, const Inputs& inputs, int64_t row)
      : first(static_cast<const Value*>(weight.values) + row), rows(weight.rows), in(inputs) {}

  inline const Value* at(int64_t number) const { return first + in.channels[number] * rows; }
  inline Next<Value> behind(int64_t group) const {
    Next<Value> next;
    next.any = group + kChannels < in.count;
    for (int i = 0; i < kChannels; ++i) {
      const int64_t number = group + kChannels + i;
      next.channels[i] = at(number < in.count ? number : in.count - 1);
    }
    return next;
  }
};

// sums += channels times x for the rows of a tile.
template <class Isa, int Count, bool Fetch>
inline void add_floats(const uint16_t* const* channels, const float* x, const Next<uint16_t>& next, int64_t rows,
                       float* sums) {
  typename Isa::Lanes inputs[Count];
  for (int i = 0; i < Count; ++i) inputs[i] = Isa::spread(x[i]);
  int64_t row = 0;
  for (; row + kFloatLine <= rows; row += kFloatLine) {
    if (Fetch) next.fetch(row);
    Isa::template add_floats<Count>(channels, row, inputs, sums + row);
  }
  if (row == rows) return;
  if (Fetch) next.fetch(row);
  uint16_t copies[Count][kFloatLine] = {};
  const uint16_t* at[Count];
  for (int i = 0; i < Count; ++i)
    at[i] = static_cast<const uint16_t*>(memcpy(copies[i], channels[i] + row, size_t(rows - row) * 2));
  Isa::template add_floats<Count>(at, 0, inputs, sums + row);
}

template <class Isa, bool Fetch>
inline void add_floats_of(int count, const uint16_t* const* channels, const float* x, const Next<uint16_t>& next,
                          int64_t rows, float* sums) {
  static_assert(kChannels == 8, "a case for each count");
  switch (count) {
    case 1: return add_floats<Isa, 1, Fetch>(channels, x, next, rows, sums);
    case 2: return add_floats<Isa, 2, Fetch>(channels, x, next, rows, sums);
    case 3: return add_floats<Isa, 3, Fetch>(channels, x, next, rows, sums);
    case 4: return add_floats<Isa, 4, Fetch>(channels, x, next, rows, sums);
    case 5: return add_floats<Isa, 5, Fetch>(channels, x, next, rows, sums);
    case 6: return add_floats<Isa, 6, Fetch>(channels, x, next, rows, sums);
    case 7: return add_floats<Isa, 7, Fetch>(channels, x, next, rows, sums);
    case 8: return add_floats<Isa, 8, Fetch>(channels, x, next, rows, sums);
  }
}

// Rows [row, row + rows) times `tokens` inputs, from `token` on.
template <class Isa>
void columns_tile_floats(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t token,
                         int64_t tokens, int64_t row, int64_t rows) {
  alignas(64) float sums[sparity::kMostSums];
  const Channels<uint16_t> source(weight, in, row);
  const float* x = static_cast<const float*>(in.x) + token * in.stride;
  const int64_t width = (rows + kFloatLine - 1) / kFloatLine * kFloatLine;
  memset(sums, 0, size_t(tokens * width) * sizeof(float));
  for (int64_t group = 0; group < in.count; group += kChannels) {
    Next<uint16_t> next = source.behind(group);
    const int all = int(in.count - group < kChannels ? in.count - group : kChannels);
    for (int64_t t = 0; t < tokens; ++t) {
      const uint16_t* channels[kChannels];
      float inputs[kChannels];
      int count = 0;
      for (int i = 0; i < all; ++i) {  // a token's own zeros add nothing, whatever the weight is
        channels[count] = source.at(group + i);
        inputs[count] = x[t * in.stride + group + i];
        count += inputs[count] != 0;
      }
      if (next.any && count)
        add_floats_of<Isa, true>(count, channels, inputs, next, rows, sums + t * width);
      else
        add_floats_of<Isa, false>(count, channels, inputs, next, rows, sums + t * width);
      next.any = next.any && !count;
    }
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t line = 0; line < rows; line += kFloatLine) {
      float ordered[kFloatLine];
      for (int i = 0; i < kFloatLine; ++i) ordered[i] = sums[t * width + line + float_place<Isa::kVector>(i)];
      const int64_t left = rows - line < kFloatLine ? rows - line : kFloatLine;
      store_all(out, (token + t) * weight.rows + row + line, ordered, left);
    }
}

template <class Isa, int Fours, int Tokens, bool Fetch>
inline void add_bytes(const int8_t* const* channels, const int8_t* x, int64_t stride, const Next<int8_t>& next,
                      int64_t rows, int32_t* sums, int64_t width) {
  int32_t inputs[Fours][Tokens];
  for (int four = 0; four < Fours; ++four)
    for (int t = 0; t < Tokens; ++t) memcpy(&inputs[four][t], x + t * stride + 4 * four, 4);
  int64_t row = 0;
  for (; row + kByteLine <= rows; row += kByteLine) {
    if (Fetch) next.fetch(row);
    Isa::template add_bytes<Fours, Tokens>(channels, row, inputs, sums + row, width);
  }
  if (row == rows) return;
  if (Fetch) next.fetch(row);
  int8_t copies[4 * Fours][kByteLine] = {};
  const int8_t* at[4 * Fours];
  for (int i = 0; i < 4 * Fours; ++i)
    at[i] = static_cast<const int8_t*>(memcpy(copies[i], channels[i] + row, size_t(rows - row)));
  Isa::template add_bytes<Fours, Tokens>(at, 0, inputs, sums + row, width);
}

template <class Isa, int Tokens>
inline void add_group_of_bytes(int fours, bool fetch, const int8_t* const* channels, const int8_t* x, int64_t stride,
                               const Next<int8_t>& next, int64_t rows, int32_t* sums, int64_t width) {
  if (fours == 1)  // the last group
    add_bytes<Isa, 1, Tokens, false>(channels, x, stride, next, rows, sums, width);
  else if (fetch)
    add_bytes<Isa, 2, Tokens, true>(channels, x, stride, next, rows, sums, width);
  else
    add_bytes<Isa, 2, Tokens, false>(channels, x, stride, next, rows, sums, width);
}

// The inputs of a group are filled up with zeros to fours.
template <class Isa>
void columns_tile_bytes(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t token,
                        int64_t tokens, int64_t row, int64_t rows) {
  alignas(64) int32_t sums[sparity::kMostSums];
  const Channels<int8_t> source(weight, in, row);
  const int8_t* x = static_cast<const int8_t*>(in.x) + token * in.stride;
  const int64_t width = (rows + kByteLine - 1) / kByteLine * kByteLine;
  memset(sums, 0, size_t(tokens * width) * sizeof(int32_t));
  for (int64_t group = 0; group < in.count; group += kChannels) {
    const Next<int8_t> next = source.behind(group);
    const int8_t* channels[kChannels];
    for (int i = 0; i < kChannels; ++i) channels[i] = source.at(group + i < in.count ? group + i : in.count - 1);
    const int fours = in.count - group > 4 ? 2 : 1;
    const auto add = [&](auto count, int64_t t) __attribute__((always_inline)) {
      add_group_of_bytes<Isa, count>(fours, next.any && t == 0, channels, x + t * in.stride + group, in.stride, next,
                                     rows, sums + t * width, width);
    };
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) add(std::integral_constant<int, 4>(), t);
    if (tokens - t == 3) add(std::integral_constant<int, 3>(), t);
    if (tokens - t == 2) add(std::integral_constant<int, 2>(), t);
    if (tokens - t == 1) add(std::integral_constant<int, 1>(), t);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    const uint32_t shift = uint32_t(Isa::kWeightShift) * uint32_t(in.sums[token + t]);  // int32 wraps, and comes back
    for (int64_t line = 0; line < rows; line += kByteLine) {
      float ordered[kByteLine];
      const int64_t left = rows - line < kByteLine ? rows - line : kByteLine;
      for (int64_t i = 0; i < left; ++i) {
        const int32_t sum = int32_t(uint32_t(sums[t * width + line + byte_place<Isa::kVector>(i)]) - shift);
        const double scale = double(weight.scales[row + line + i]) * double(in.scales[token + t]);
        ordered[i] = float(double(sum) * scale);
      }
      store_all(out, (token + t) * weight.rows + row + line, ordered, left);
    }
  }
}

// The tiles that begin within units [begin, end), of 4 rows.
template <class Isa>
void columns(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t tokens, int64_t begin,
             int64_t end) {
  const int64_t size = in.tile_rows;
  const int64_t last = end * kTileRows < weight.rows ? end * kTileRows : weight.rows;
  for (int64_t row = (begin * kTileRows + size - 1) / size * size; row < last; row += size) {
    const int64_t rows = weight.rows - row < size ? weight.rows - row : size;
    for (int64_t token = 0; token < tokens; token += sparity::kMostTokens) {
      const int64_t now = tokens - token < sparity::kMostTokens ? tokens - token : sparity::kMostTokens;
      if (weight.scales)
        columns_tile_bytes<Isa>(weight, in, out, token, now, row, rows);
      else
        columns_tile_floats<Isa>(weight, in, out, token, now, row, rows);
    }
  }
}
