// Dense weights. Few inputs: one row at a time, a single stream, which memory delivers faster than several at once.
// More: four rows at a time, so that each input is read once for four rows. Included by gemv.h inside its namespace.

constexpr int64_t kNearInputs = 32768;  // bytes of inputs that stay in the first cache beside the weights

// Four rows as `tile_floats` and `tile_bytes` read them; rows beyond the matrix repeat the last one.
template <class Isa>
struct Whole {
  const char* rows[kTileRows];
  int64_t columns;

  Whole(const SparityMatrix& weight, int64_t tile, int64_t element) : columns(weight.columns) {
    for (int row = 0; row < kTileRows; ++row) {
      const int64_t at = tile * kTileRows + row < weight.rows ? tile * kTileRows + row : weight.rows - 1;
      rows[row] = static_cast<const char*>(weight.values) + at * columns * element;
    }
  }

  inline void ahead(int) const {}
  inline bool has_room(int) const { return true; }

  inline void floats(int64_t group, int row, bool, typename Isa::Floats& low, typename Isa::Floats& high) {
    const auto* at = reinterpret_cast<const uint16_t*>(rows[row]) + group * kGroup;
    uint16_t copy[kGroup];
    if ((group + 1) * kGroup <= columns) {
      __builtin_prefetch(at + kAheadOfRow / 2);
      __builtin_prefetch(at + kAheadOfRow / 2 + 32);
    } else {
      memset(copy, 0, sizeof copy);
      memcpy(copy, at, size_t(columns - group * kGroup) * 2);
      at = copy;
    }
    low = Isa::load_floats(at);
    high = Isa::load_floats(at + 32);
  }

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

template <class Isa, int Tokens>
inline void dense_row_floats(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t token,
                             int64_t row) {
  const auto* values = static_cast<const uint16_t*>(weight.values) + row * weight.columns;
  const auto* x = static_cast<const typename Isa::X*>(in.x) + token * in.stride;
  typename Isa::Sum low[Tokens] = {}, high[Tokens] = {};
  int64_t column = 0;
  for (; column + kGroup <= weight.columns; column += kGroup) {
    __builtin_prefetch(values + column + kAhead / 2);
    __builtin_prefetch(values + column + kAhead / 2 + 32);
    const typename Isa::Floats first = Isa::load_floats(values + column);
    const typename Isa::Floats second = Isa::load_floats(values + column + 32);
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) {
      low[t] = Isa::multiply(low[t], first, x + t * in.stride + column);
      high[t] = Isa::multiply(high[t], second, x + t * in.stride + column + 32);
    }
  }
  if (column < weight.columns) {
    uint16_t copy[kGroup] = {};
    memcpy(copy, values + column, size_t(weight.columns - column) * 2);
    for (int t = 0; t < Tokens; ++t) {
      low[t] = Isa::multiply(low[t], Isa::load_floats(copy), x + t * in.stride + column);
      high[t] = Isa::multiply(high[t], Isa::load_floats(copy + 32), x + t * in.stride + column + 32);
    }
  }
  for (int t = 0; t < Tokens; ++t)
    store(out, (token + t) * weight.rows + row, Isa::sum(low[t]) + Isa::sum(high[t]));
}

template <class Isa, int Tokens>
inline void dense_row_bytes(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t token,
                            int64_t row) {
  const auto* values = static_cast<const int8_t*>(weight.values) + row * weight.columns;
  const auto* x = static_cast<const typename Isa::Q*>(in.x) + token * in.stride;
  typename Isa::Total totals[Tokens] = {};
  int64_t column = 0;
  for (; column + kGroup <= weight.columns; column += kGroup) {
    __builtin_prefetch(values + column + kAhead);
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

template <class Isa, int Tokens>
inline void dense_row(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t token, int64_t row) {
  if (weight.scales)
    dense_row_bytes<Isa, Tokens>(weight, in, out, token, row);
  else
    dense_row_floats<Isa, Tokens>(weight, in, out, token, row);
}

template <class Isa>
inline void dense_tile(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t tokens,
                       int64_t tile) {
  const bool near = weight.scales && in.stride * (tokens < 4 ? tokens : 4) <= kNearInputs;
  if (tokens > 2 && !near) return tile_all_tokens<Isa, Whole<Isa>>(weight, in, out, tokens, tile);
  for (int64_t row = tile * kTileRows; row < (tile + 1) * kTileRows && row < weight.rows; ++row) {
    int64_t token = 0;
    for (; token + 4 <= tokens; token += 4) dense_row<Isa, 4>(weight, in, out, token, row);
    if (tokens - token == 3) dense_row<Isa, 3>(weight, in, out, token, row);
    if (tokens - token == 2) dense_row<Isa, 2>(weight, in, out, token, row);
    if (tokens - token == 1) dense_row<Isa, 1>(weight, in, out, token, row);
  }
}
