// Dense weights. Few inputs: one row at a time, a single stream, which memory delivers faster than several at once.
// More: two rows at a time (int8: four), so that each input is read once for them. Included by gemv.h inside its
// namespace.

constexpr int64_t kNearInputs = 32768;  // bytes of inputs that stay in the first cache beside the weights

// Four rows of int8 as `tile_bytes` reads them; rows beyond the matrix repeat the last one.
template <class Isa>
struct Whole {
  const char* rows[kTileRows];
  int64_t columns;

  Whole(const SparityMatrix& weight, int64_t tile) : columns(weight.columns) {
    for (int row = 0; row < kTileRows; ++row) {
      const int64_t at = tile * kTileRows + row < weight.rows ? tile * kTileRows + row : weight.rows - 1;
      rows[row] = static_cast<const char*>(weight.values) + at * columns;
    }
  }

  inline void ahead(int) const {}
  inline bool has_room(int) const { return true; }

  inline typename Isa::Bytes bytes(int64_t group, int row, bool) {
    const auto* at = reinterpret_cast<const int8_t*>(rows[row]) + group * kGroup;
    int8_t copy[kGroup];
    if ((group + 1) * kGroup <= columns) {
      __builtin_prefetch(at + kAheadOfRow);
    } else {
      memset(copy, 0, sizeof copy);
      at = static_cast<const int8_t*>(memcpy(copy, at, size_t(columns - group * kGroup)));
    }
    return Isa::load_bytes(at);
  }
};

// `Rows` neighbouring rows; what lies `ahead` weights further is fetched. The order of a sum's terms depends on neither
// `Tokens` nor `Rows`: an input's result is the same whatever comes with it.
template <class Isa, int Tokens, int Rows>
inline void dense_rows_floats(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t token,
                              int64_t row, int64_t ahead) {
  const auto* values = static_cast<const uint16_t*>(weight.values) + row * weight.columns;
  const auto* x = static_cast<const typename Isa::X*>(in.x) + token * in.stride;
  typename Isa::Sum low[Rows][Tokens] = {}, high[Rows][Tokens] = {};
  const auto add = [&](int r, const uint16_t* from, int64_t column) __attribute__((always_inline)) {
    const typename Isa::Floats first = Isa::load_floats(from), second = Isa::load_floats(from + 32);
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) {
      low[r][t] = Isa::multiply(low[r][t], first, x + t * in.stride + column);
      high[r][t] = Isa::multiply(high[r][t], second, x + t * in.stride + column + 32);
    }
  };
  int64_t column = 0;
  for (; column + kGroup <= weight.columns; column += kGroup) {
#pragma GCC unroll 2
    for (int r = 0; r < Rows; ++r) {
      const uint16_t* at = values + r * weight.columns + column;
      __builtin_prefetch(at + ahead);
      __builtin_prefetch(at + ahead + 32);
      add(r, at, column);
    }
  }
  if (column < weight.columns) {
#pragma GCC unroll 2
    for (int r = 0; r < Rows; ++r) {
      uint16_t copy[kGroup] = {};
      memcpy(copy, values + r * weight.columns + column, size_t(weight.columns - column) * 2);
      add(r, copy, column);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int t = 0; t < Tokens; ++t)
      store(out, (token + t) * weight.rows + row + r, Isa::sum(Isa::add(low[r][t], high[r][t])));
}

template <class Isa, int Tokens>
inline void dense_row_bytes(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t token,
                            int64_t row, int64_t ahead) {
  const auto* values = static_cast<const int8_t*>(weight.values) + row * weight.columns;
  const auto* x = static_cast<const typename Isa::Q*>(in.x) + token * in.stride;
  typename Isa::Total totals[Tokens] = {};
  int64_t column = 0;
  for (; column + kGroup <= weight.columns; column += kGroup) {
    __builtin_prefetch(values + column + ahead);
    const typename Isa::Bytes weights = Isa::load_bytes(values + column);
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) totals[t] = Isa::multiply(totals[t], weights, x + t * in.stride + column);
  }
  if (column < weight.columns) {
    int8_t copy[kGroup] = {};
    memcpy(copy, values + column, size_t(weight.columns - column));
    const typename Isa::Bytes weights = Isa::load_bytes(copy);
    for (int t = 0; t < Tokens; ++t) totals[t] = Isa::multiply(totals[t], weights, x + t * in.stride + column);
  }
  for (int t = 0; t < Tokens; ++t) store_scaled<Isa>(weight, in, out, token + t, row, Isa::total(totals[t]));
}

template <class Isa>
inline void dense_tile_bytes(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t tokens,
                             int64_t tile) {
  const Whole<Isa> source(weight, tile);
  int64_t token = 0;
  for (; token + 4 <= tokens; token += 4) tile_bytes<Isa, 4>(weight, in, out, token, tile, source);
  if (tokens - token == 3) tile_bytes<Isa, 3>(weight, in, out, token, tile, source);
  if (tokens - token == 2) tile_bytes<Isa, 2>(weight, in, out, token, tile, source);
  if (tokens - token == 1) tile_bytes<Isa, 1>(weight, in, out, token, tile, source);
}

constexpr int64_t far_ahead(const SparityMatrix& weight) { return weight.scales ? kAhead : kAhead / 2; }

// All inputs times the row, or (floats) the two rows, from `row` on.
template <class Isa, int Rows>
inline void dense_all_tokens(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t tokens,
                             int64_t row, int64_t ahead) {
  const auto multiply = [&](auto count, int64_t token) __attribute__((always_inline)) {
    if (weight.scales)
      dense_row_bytes<Isa, count>(weight, in, out, token, row, ahead);
    else
      dense_rows_floats<Isa, count, Rows>(weight, in, out, token, row, ahead);
  };
  int64_t token = 0;
  for (; token + 4 <= tokens; token += 4) multiply(std::integral_constant<int, 4>(), token);
  if (tokens - token == 3) multiply(std::integral_constant<int, 3>(), token);
  if (tokens - token == 2) multiply(std::integral_constant<int, 2>(), token);
  if (tokens - token == 1) multiply(std::integral_constant<int, 1>(), token);
}

template <class Isa>
inline void dense_tile(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t tokens,
                       int64_t tile) {
  const bool many = tokens > 2;
  if (many && weight.scales && in.stride * (tokens < 4 ? tokens : 4) > kNearInputs)
    return dense_tile_bytes<Isa>(weight, in, out, tokens, tile);
  const int64_t first = tile * kTileRows;
  const int64_t end = first + kTileRows < weight.rows ? first + kTileRows : weight.rows;
  int64_t row = first;
  if (many && !weight.scales)
    for (; row + 2 <= end; row += 2) dense_all_tokens<Isa, 2>(weight, in, out, tokens, row, far_ahead(weight));
  for (; row < end; ++row) dense_all_tokens<Isa, 1>(weight, in, out, tokens, row, far_ahead(weight));
}

// Some rows, rising, with the bits that they have among all; rows that are read later are fetched.
template <class Isa>
void dense_listed(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t tokens,
                  const int32_t* rows, int64_t count, int64_t begin, int64_t end) {
  if (weight.group) return rows_listed<Isa>(weight, in, out, tokens, rows, begin, end);
  const int64_t later = (far_ahead(weight) + weight.columns - 1) / weight.columns;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t next = rows[i + later < count ? i + later : count - 1];
    dense_all_tokens<Isa, 1>(weight, in, out, tokens, rows[i], (next - rows[i]) * weight.columns);
  }
}
