// bfloat16 by input channel. Part of columns.h: included there, within its namespace. `Isa` gives
//   kTogether, Multiplier   how many neighbours of the list are multiplied at once, and their inputs, joined by `multiplier`
//   float_place             see `Kind::place` in columns.h
//   add_floats<Count, Tokens>(channels, row, x, sums, width)   one line of rows; one channel after another

template <class Isa, int Count, int Tokens>
using Multipliers = typename Isa::Multiplier[(Count + Isa::kTogether - 1) / Isa::kTogether][Tokens];

struct FloatColumns {
  using Sum = float;
  static constexpr int64_t kLine = 32;

  template <class Isa>
  static inline int64_t place(int64_t row) {
    return Isa::float_place(row);
  }
  static inline float plus(float a, float b) { return a + b; }

  template <class Isa, int Count, int Tokens, bool Fetch>
  static inline void add_lines(const uint16_t* const* channels, const Multipliers<Isa, Count, Tokens>& x,
                               const Next<uint16_t, kChannels>& next, int64_t rows, float* sums, int64_t width) {
    int64_t row = 0;
    for (; row + kLine <= rows; row += kLine) {
      if (Fetch) next.fetch(row);
      Isa::template add_floats<Count, Tokens>(channels, row, x, sums + row, width);
    }
    if (row == rows) return;
    if (Fetch) next.fetch(row);
    uint16_t copies[Count][kLine] = {};
    const uint16_t* at[Count];
    for (int i = 0; i < Count; ++i)
      at[i] = static_cast<const uint16_t*>(memcpy(copies[i], channels[i] + row, size_t(rows - row) * 2));
    Isa::template add_floats<Count, Tokens>(at, 0, x, sums + row, width);
  }

  // x: [Tokens, stride].
  template <class Isa, int Count, int Tokens>
  static inline void add_some(const uint16_t* const* channels, const float* x, int64_t stride,
                              const Next<uint16_t, kChannels>& next, bool fetch, int64_t rows, float* sums, int64_t width) {
    Multipliers<Isa, Count, Tokens> inputs;
    for (int i = 0; i < Count; i += Isa::kTogether)
      for (int t = 0; t < Tokens; ++t) {
        const float* at = x + t * stride + i;
        inputs[i / Isa::kTogether][t] = Isa::multiplier(at[0], i + 1 < Count ? at[1] : 0.0f);
      }
    if (fetch)
      add_lines<Isa, Count, Tokens, true>(channels, inputs, next, rows, sums, width);
    else
      add_lines<Isa, Count, Tokens, false>(channels, inputs, next, rows, sums, width);
  }

  template <class Isa>
  static inline void add_count(int count, const uint16_t* const* channels, const float* x, const Next<uint16_t, kChannels>& next,
                               bool fetch, int64_t rows, float* sums) {
    static_assert(kChannels == 8, "a case for each count");
    switch (count) {
      case 1: return add_some<Isa, 1, 1>(channels, x, 0, next, fetch, rows, sums, 0);
      case 2: return add_some<Isa, 2, 1>(channels, x, 0, next, fetch, rows, sums, 0);
      case 3: return add_some<Isa, 3, 1>(channels, x, 0, next, fetch, rows, sums, 0);
      case 4: return add_some<Isa, 4, 1>(channels, x, 0, next, fetch, rows, sums, 0);
      case 5: return add_some<Isa, 5, 1>(channels, x, 0, next, fetch, rows, sums, 0);
      case 6: return add_some<Isa, 6, 1>(channels, x, 0, next, fetch, rows, sums, 0);
      case 7: return add_some<Isa, 7, 1>(channels, x, 0, next, fetch, rows, sums, 0);
      case 8: return add_some<Isa, 8, 1>(channels, x, 0, next, fetch, rows, sums, 0);
    }
  }

  // A token's own channels of a group: its zeros meet no weight.
  template <class Isa>
  static inline bool add_own(const uint16_t* const* group, int all, const float* x, const Next<uint16_t, kChannels>& next,
                             bool fetch, int64_t rows, float* sums) {
    const uint16_t* channels[kChannels];
    float inputs[kChannels];
    int count = 0;
    for (int i = 0; i < all; ++i) {
      channels[count] = group[i];
      inputs[count] = x[i];
      count += inputs[count] != 0;
    }
    add_count<Isa>(count, channels, inputs, next, fetch, rows, sums);
    return count;
  }

  // Whether each of the tokens uses some channel of a group. Then multiplying all of them by all of its channels takes
  // no longer than each by its own: what is loaded and taken apart once weighs more than products with zeros.
  static inline bool each_uses(const float* x, int64_t stride, int tokens) {
    for (int t = 0; t < tokens; ++t) {
      int used = 0;
      for (int i = 0; i < kChannels; ++i) used += x[t * stride + i] != 0;
      if (!used) return false;
    }
    return true;
  }

  // With finite weights a zero adds nothing, so tokens may share channels that not all of them use; `own`: never.
  template <class Isa>
  static void add_range(const SparityMatrix& weight, const Inputs& in, int64_t part, int64_t token, int64_t tokens,
                        int64_t row, int64_t rows, bool own, float* sums) {
    const int64_t end = in.begins[part + 1], width = whole_lines(rows, kLine);
    const Channels<uint16_t, kChannels> source(weight, in, end, row);
    for (int64_t group = in.begins[part]; group < end; group += kChannels) {
      const float* x = static_cast<const float*>(in.x) + token * in.stride + group;
      const Next<uint16_t, kChannels> next = source.behind(group);
      const int all = source.in_group(group);
      const uint16_t* channels[kChannels];
      for (int i = 0; i < all; ++i) channels[i] = source.at(group + i);
      bool fetch = next.any;
      for (int64_t t = 0; t < tokens;) {
        const int some = int(tokens - t < Isa::kFloatTokens ? tokens - t : Isa::kFloatTokens);
        const float* inputs = x + t * in.stride;
        float* to = sums + t * width;
        if (all < kChannels || own || some == 1 || !each_uses(inputs, in.stride, some)) {
          for (int i = 0; i < some; ++i)
            if (add_own<Isa>(channels, all, inputs + i * in.stride, next, fetch, rows, to + i * width)) fetch = false;
        } else {
          if (some == 2) add_some<Isa, kChannels, 2>(channels, inputs, in.stride, next, fetch, rows, to, width);
          if (some == 3) add_some<Isa, kChannels, 3>(channels, inputs, in.stride, next, fetch, rows, to, width);
          if (some == 4) add_some<Isa, kChannels, 4>(channels, inputs, in.stride, next, fetch, rows, to, width);
          fetch = false;
        }
        t += some;
      }
    }
  }

  template <class Isa>
  static void add(const SparityMatrix& weight, const Inputs& in, int64_t part, int64_t token, int64_t tokens,
                  int64_t row, int64_t rows, float* sums) {
    add_range<Isa>(weight, in, part, token, tokens, row, rows, false, sums);
  }

  template <class Isa>
  static void store(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t tokens, int64_t token,
                    int64_t row, int64_t rows, float* totals);
};

inline bool all_finite(const float* values, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    memcpy(&bits, values + i, 4);
    bits &= 0x7f800000;
    most = bits > most ? bits : most;
  }
  return most != 0x7f800000;
}

template <class Isa, class Kind>
inline void in_order(const typename Kind::Sum* sums, int64_t rows, typename Kind::Sum* out);

// A weight that is not finite has met zeros, so such sums are computed anew from the token's own channels.
template <class Isa>
void FloatColumns::store(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t tokens,
                         int64_t token, int64_t row, int64_t rows, float* totals) {
  if (tokens > 1 && !all_finite(totals, rows)) {
    const int64_t width = whole_lines(rows, kLine);
    alignas(64) float sums[sparity::kMostRows], all[sparity::kMostRows];
    for (int64_t part = 0; part < in.parts; ++part) {
      memset(sums, 0, size_t(width) * sizeof(float));
      add_range<Isa>(weight, in, part, token, 1, row, rows, true, sums);
      for (int64_t i = 0; i < width; ++i) all[i] = part ? all[i] + sums[i] : sums[i];
    }
    in_order<Isa, FloatColumns>(all, rows, totals);
  }
  for (int64_t i = 0; i < rows; ++i) totals[i] += 0.0f;  // -0 as 0, whatever was skipped
  store_all(out, token * weight.rows + row, totals, rows);
}
