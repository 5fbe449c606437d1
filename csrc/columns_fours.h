// int4 by input channel: two rows in a byte, scales and zero points [columns / group, rows]. Inputs are int8 in groups, as
// for other int4 weights; a group's sum is a whole number, which is scaled and added in float32, group after group, with
// the same bits on every instruction set. Part of columns.h: included there, within its namespace.
// `Isa::ColumnFours` gives
//   kTokens                        that are multiplied at once
//   order_zeros(zeros, out)        zero points of a line of rows as add reads them, each four times
//   add<Tokens, Zeros>(channels, fours, at, x, zeros, totals, ahead)
//                                  totals [Tokens, 128] of a line that begins at byte `at`: of codes made unsigned, which
//                                  are steps + 8, or steps + zero points; calls ahead.step<Passes>() `fours` times in each
//                                  of so many passes

struct FourColumns {
  using Sum = float;
  static constexpr int64_t kLine = sparity::kMostLine;
  static constexpr int kMostChannels = 128;  // of a group

  template <class Isa>
  static constexpr int64_t place(int64_t row) {
    return row;
  }
  static inline float plus(float a, float b) { return a + b; }

  // The channels of a group that are used, filled up to fours.
  struct Group {
    const uint8_t* channels[kMostChannels];
    int fours = 0;
    int64_t count = 0;

    Group(const SparityMatrix& weight, const Inputs& in, int64_t group, int64_t row) {
      const int64_t begin = in.groups[group], across = (weight.rows + 1) / 2;
      count = in.groups[group + 1] - begin;
      fours = int(count + 3) / 4;
      const auto* values = static_cast<const uint8_t*>(weight.values) + row / 2;
      for (int64_t i = 0; i < 4 * fours; ++i)
        channels[i] = values + in.channels[begin + (i < count ? i : count - 1)] * across;
    }
  };

  // Fetches the channels of the next group one after another, a few lines for every four channels that are multiplied: memory
  // is asked all the time, and never for more at once than it takes.
  struct Ahead {
    const Group* group;  // null: there is nothing to fetch
    int64_t lines, fours;
    int64_t channel = 0, line = 0;

    template <int Passes>
    inline void step() {
      if (!group) return;
      for (int64_t left = (group->count + Passes * fours - 1) / (Passes * fours); left > 0; --left) {
        if (channel == group->count) return;
        __builtin_prefetch(group->channels[channel] + 64 * line, 0, 2);
        if (++line < lines) continue;
        line = 0;
        ++channel;
      }
    }
  };

  // One line of rows: `count` of them, from `row` on, whose bytes begin at `at` of each channel.
  template <class Isa, int Tokens, bool Zeros>
  static inline void add_line(const SparityMatrix& weight, const Inputs& in, const Group& from, int64_t group,
                              int64_t token, int64_t row, int64_t count, int64_t at, const int32_t* x, Ahead& ahead,
                              float* sums, int64_t width) {
    alignas(64) int32_t totals[Tokens][kLine];
    alignas(64) uint32_t ordered[Zeros ? kLine : 1];
    uint8_t zeros[kLine];
    float scales[kLine + sparity::kScaleLanes];
    const int64_t first = group * weight.rows + row;
    load_scales(weight, first, count, scales);
    for (int64_t i = count; i < kLine; ++i) scales[i] = 0;
    if (Zeros) {
      memcpy(zeros, weight.zeros + first, size_t(count));
      memset(zeros + count, 0, size_t(kLine - count));
      Isa::ColumnFours::order_zeros(zeros, ordered);
    }
    if (count == kLine) {
      Isa::ColumnFours::template add<Tokens, Zeros>(from.channels, from.fours, at, x, ordered, totals, ahead);
    } else {
      uint8_t copies[kMostChannels][kLine / 2];
      const uint8_t* channels[kMostChannels];
      for (int i = 0; i < 4 * from.fours; ++i) {
        memset(copies[i], 0, kLine / 2);
        channels[i] = static_cast<const uint8_t*>(memcpy(copies[i], from.channels[i] + at, size_t(count + 1) / 2));
      }
      Isa::ColumnFours::template add<Tokens, Zeros>(channels, from.fours, 0, x, ordered, totals, ahead);
    }
    for (int t = 0; t < Tokens; ++t) {
      const int32_t shift = in.shifts[(token + t) * in.group_stride + group];
      const float scale = in.scales[(token + t) * in.group_stride + group];
      float* to = sums + t * width;
      for (int64_t i = 0; i < kLine; ++i) {
        const int32_t total = totals[t][i] - (Zeros ? int32_t(zeros[i]) : 8) * shift;
        to[i] += float(total) * (scales[i] * scale);
      }
    }
  }

  template <class Isa, int Tokens, bool Zeros>
  static inline void add_group(const SparityMatrix& weight, const Inputs& in, const Group& from, Ahead& ahead,
                               int64_t group, int64_t token, int64_t row, int64_t rows, float* sums, int64_t width) {
    int32_t x[kMostChannels / 4 * Tokens] = {};
    for (int four = 0; four < from.fours; ++four) {
      const int64_t left = from.count - 4 * four < 4 ? from.count - 4 * four : 4;
      for (int t = 0; t < Tokens; ++t)
        memcpy(x + four * Tokens + t,
               static_cast<const int8_t*>(in.x) + (token + t) * in.stride + in.groups[group] + 4 * four, size_t(left));
    }
    for (int64_t line = 0; line < rows; line += kLine) {
      const int64_t count = rows - line < kLine ? rows - line : kLine;
      add_line<Isa, Tokens, Zeros>(weight, in, from, group, token, row + line, count, line / 2, x, ahead, sums + line,
                              width);
    }
  }

  template <class Isa, bool Zeros>
  static inline void add_tokens(const SparityMatrix& weight, const Inputs& in, const Group& from, Ahead& ahead,
                                int64_t group, int64_t token, int64_t tokens, int64_t row, int64_t rows, float* sums,
                                int64_t width) {
    constexpr int kTokens = Isa::ColumnFours::kTokens;
    const auto add = [&](auto count, int64_t t) {
      add_group<Isa, count, Zeros>(weight, in, from, ahead, group, token + t, row, rows, sums + t * width, width);
      ahead.group = nullptr;
    };
    int64_t t = 0;
    for (; t + kTokens <= tokens; t += kTokens) add(std::integral_constant<int, kTokens>(), t);
    for (; t + 2 <= tokens; t += 2) add(std::integral_constant<int, 2>(), t);
    if (t < tokens) add(std::integral_constant<int, 1>(), t);
  }

  // Whether nothing of a group is to be added: no channel is used, and all inputs are finite.
  static inline bool silent(const Inputs& in, int64_t group, int64_t token, int64_t tokens) {
    if (in.groups[group] != in.groups[group + 1]) return false;
    for (int64_t t = token; t < token + tokens; ++t)
      if (in.scales[t * in.group_stride + group] != in.scales[t * in.group_stride + group]) return false;
    return true;
  }

  template <class Isa>
  static void add(const SparityMatrix& weight, const Inputs& in, int64_t part, int64_t token, int64_t tokens,
                  int64_t row, int64_t rows, float* sums) {
    const int64_t end = in.begins[part + 1], width = whole_lines(rows, kLine);
    for (int64_t group = in.begins[part]; group < end; ++group) {
      if (silent(in, group, token, tokens)) continue;
      const Group now(weight, in, group, row), next(weight, in, group + 1 < end ? group + 1 : group, row);
      Ahead ahead = {group + 1 < end ? &next : nullptr, width / kLine, now.fours};
      if (weight.zeros)
        add_tokens<Isa, true>(weight, in, now, ahead, group, token, tokens, row, rows, sums, width);
      else
        add_tokens<Isa, false>(weight, in, now, ahead, group, token, tokens, row, rows, sums, width);
    }
  }

  template <class Isa>
  static void store(const SparityMatrix& weight, const Inputs&, const Outputs& out, int64_t, int64_t token, int64_t row,
                    int64_t rows, float* totals) {
    for (int64_t i = 0; i < rows; ++i) totals[i] += 0.0f;  // -0 as 0, whatever was skipped
    store_all(out, token * weight.rows + row, totals, rows);
  }
};
