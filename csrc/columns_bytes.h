// int8 by input channel. Part of columns.h: included there, within its namespace. `Isa` gives
//   add_bytes<Fours, Tokens>(channels, row, x, sums, width)   one line of rows; four channels at a time, x joined likewise
//   kWeightShift     what it adds to the weights; kVector, the bytes of its vectors, gives the order of the sums

struct ByteColumns {
  using Sum = int32_t;
  static constexpr int64_t kLine = 64;
  static constexpr int kAtOnce = 16;

  template <class Isa>
  static inline int64_t place(int64_t row) {
    constexpr int64_t vector = Isa::kVector;
    return row / vector * vector + row % 16 / 4 * (vector / 4) + row % vector / 16 * 4 + row % 4;
  }
  static inline int32_t plus(int32_t a, int32_t b) { return int32_t(uint32_t(a) + uint32_t(b)); }  // wraps, and comes back

  template <class Isa, int Fours, int Tokens, bool Fetch>
  static inline void add_lines(const int8_t* const* channels, const int32_t (&x)[Fours][Tokens],
                               const Next<int8_t, kAtOnce>& next, int64_t rows, int32_t* sums, int64_t width) {
    int64_t row = 0;
    for (; row + kLine <= rows; row += kLine) {
      if (Fetch) next.fetch(row);
      Isa::template add_bytes<Fours, Tokens>(channels, row, x, sums + row, width);
    }
    if (row == rows) return;
    if (Fetch) next.fetch(row);
    int8_t copies[4 * Fours][kLine] = {};
    const int8_t* at[4 * Fours];
    for (int i = 0; i < 4 * Fours; ++i)
      at[i] = static_cast<const int8_t*>(memcpy(copies[i], channels[i] + row, size_t(rows - row)));
    Isa::template add_bytes<Fours, Tokens>(at, 0, x, sums + row, width);
  }

  // `count` channels, filled up to fours with zero inputs; x: [Tokens, stride].
  template <class Isa, int Fours, int Tokens>
  static inline void add_some(const int8_t* const* channels, int count, const int8_t* x, int64_t stride,
                              const Next<int8_t, kAtOnce>& next, bool fetch, int64_t rows, int32_t* sums, int64_t width) {
    int32_t inputs[Fours][Tokens] = {};
    for (int four = 0; four < Fours; ++four) {
      const int left = std::min(std::max(count - 4 * four, 0), 4);
      for (int t = 0; t < Tokens; ++t) memcpy(&inputs[four][t], x + t * stride + 4 * four, size_t(left));
    }
    if (fetch)
      add_lines<Isa, Fours, Tokens, true>(channels, inputs, next, rows, sums, width);
    else
      add_lines<Isa, Fours, Tokens, false>(channels, inputs, next, rows, sums, width);
  }

  template <class Isa>
  static void add(const SparityMatrix& weight, const Inputs& in, int64_t part, int64_t token, int64_t tokens,
                  int64_t row, int64_t rows, int32_t* sums) {
    const int64_t end = in.begins[part + 1], width = whole_lines(rows, kLine);
    const Channels<int8_t, kAtOnce> source(weight, in, end, row);
    for (int64_t group = in.begins[part]; group < end; group += kAtOnce) {
      const int8_t* x = static_cast<const int8_t*>(in.x) + token * in.stride + group;
      const Next<int8_t, kAtOnce> next = source.behind(group);
      const int all = source.in_group(group);
      const int8_t* channels[kAtOnce];
      for (int i = 0; i < kAtOnce; ++i) channels[i] = source.at(i < all ? group + i : end - 1);
      const auto add_tokens = [&](auto count, int64_t t) __attribute__((always_inline)) {
        const bool fetch = next.any && t == 0;
        const int8_t* inputs = x + t * in.stride;
        if (all > 8)
          add_some<Isa, 4, count>(channels, all, inputs, in.stride, next, fetch, rows, sums + t * width, width);
        else if (all > 4)
          add_some<Isa, 2, count>(channels, all, inputs, in.stride, next, false, rows, sums + t * width, width);
        else
          add_some<Isa, 1, count>(channels, all, inputs, in.stride, next, false, rows, sums + t * width, width);
      };
      int64_t t = 0;
      for (; t + 4 <= tokens; t += 4) add_tokens(std::integral_constant<int, 4>(), t);
      if (tokens - t == 3) add_tokens(std::integral_constant<int, 3>(), t);
      if (tokens - t == 2) add_tokens(std::integral_constant<int, 2>(), t);
      if (tokens - t == 1) add_tokens(std::integral_constant<int, 1>(), t);
    }
  }

  template <class Isa>
  static void store(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t, int64_t token,
                    int64_t row, int64_t rows, int32_t* totals) {
    const uint32_t shift = uint32_t(Isa::kWeightShift) * uint32_t(in.sums[token]);
    for (int64_t line = 0; line < rows; line += kLine) {
      float values[kLine];
      const int64_t left = rows - line < kLine ? rows - line : kLine;
      for (int64_t i = 0; i < left; ++i) {
        const int32_t sum = int32_t(uint32_t(totals[line + i]) - shift);
        values[i] = float(double(sum) * (double(weight.scales[row + line + i]) * double(in.scales[token])));
      }
      store_all(out, token * weight.rows + row + line, values, left);
    }
  }
};
