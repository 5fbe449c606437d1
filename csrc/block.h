// Block rows, for blocks whose width is a multiple of 16. Included by gemv.h inside its namespace.

// `Rows` rows of one block row, from `first` on, in blocks of 32 n (+ 16) columns.
template <class Isa, int Tokens, int Rows>
inline void wide_rows(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t token,
                      int64_t block_row, int64_t first) {
  const int64_t width = weight.block_width, size = weight.block_rows * width;
  const auto* x = static_cast<const typename Isa::X*>(in.x) + token * in.stride;
  typename Isa::Sum sums[Rows][Tokens] = {};
  for (int64_t block = weight.offsets[block_row]; block < weight.offsets[block_row + 1]; ++block) {
    const uint16_t* values = static_cast<const uint16_t*>(weight.values) + block * size + first * width;
    const auto* inputs = x + weight.block_columns[block] * width;
    for (int64_t column = 0; column < width; column += 32) {
#pragma GCC unroll 8
      for (int row = 0; row < Rows; ++row) {
        const uint16_t* at = values + row * width + column;
        __builtin_prefetch(at + kAhead / 2);
#pragma GCC unroll 2
        for (int t = 0; t < Tokens; ++t) {
          const auto* xs = inputs + t * in.stride + column;
          sums[row][t] = column + 32 <= width ? Isa::multiply(sums[row][t], Isa::load_floats(at), xs)
                                              : Isa::multiply_half(sums[row][t], at, xs);
        }
      }
    }
  }
  for (int row = 0; row < Rows; ++row)
    for (int t = 0; t < Tokens; ++t)
      store_inside(weight, out, token + t, block_row * weight.block_rows + first + row, Isa::sum(sums[row][t]));
}

// The same for blocks of 16 columns, whose rows lie in pairs of 32 values.
template <class Isa, int Tokens, int Pairs>
inline void narrow_rows(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t token,
                        int64_t block_row, int64_t first) {
  const int64_t size = weight.block_rows * 16;
  const auto* x = static_cast<const typename Isa::X*>(in.x) + token * in.stride;
  typename Isa::PairSum sums[Pairs][Tokens] = {};
  for (int64_t block = weight.offsets[block_row]; block < weight.offsets[block_row + 1]; ++block) {
    const uint16_t* values = static_cast<const uint16_t*>(weight.values) + block * size + first * 16;
    const auto* inputs = x + weight.block_columns[block] * 16;
#pragma GCC unroll 8
    for (int pair = 0; pair < Pairs; ++pair) {
      __builtin_prefetch(values + 32 * pair + kAhead / 2);
      const typename Isa::Floats weights = Isa::load_floats(values + 32 * pair);
#pragma GCC unroll 2
      for (int t = 0; t < Tokens; ++t)
        sums[pair][t] = Isa::multiply_pair(sums[pair][t], weights, inputs + t * in.stride);
    }
  }
  for (int pair = 0; pair < Pairs; ++pair)
    for (int t = 0; t < Tokens; ++t) {
      float upper, lower;
      Isa::sum_pair(sums[pair][t], upper, lower);
      const int64_t row = block_row * weight.block_rows + first + 2 * pair;
      store_inside(weight, out, token + t, row, upper);
      store_inside(weight, out, token + t, row + 1, lower);
    }
}

template <class Isa, int Tokens>
inline void block_row_tokens(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t token,
                             int64_t block_row) {
  const int64_t rows = weight.block_rows;
  int64_t row = 0;
  if (weight.block_width == 16) {
    for (; row + 16 <= rows; row += 16) narrow_rows<Isa, Tokens, 8>(weight, in, out, token, block_row, row);
    for (; row + 4 <= rows; row += 4) narrow_rows<Isa, Tokens, 2>(weight, in, out, token, block_row, row);
  } else {
    for (; row + 8 <= rows; row += 8) wide_rows<Isa, Tokens, 8>(weight, in, out, token, block_row, row);
  }
  for (; row < rows; ++row) wide_rows<Isa, Tokens, 1>(weight, in, out, token, block_row, row);
}

// Whether a block that is not stored meets an input that is not finite: dense would give 0 * inf = NaN there.
template <class Isa>
inline bool misses_not_finite(const SparityMatrix& weight, const typename Isa::X* x, int64_t block_row) {
  int64_t block = weight.offsets[block_row];
  for (int64_t column = 0; column < weight.columns; ++column) {
    const float value = Isa::output(x[column]);
    if (value - value == 0) continue;
    const int64_t wanted = column / weight.block_width;
    while (block < weight.offsets[block_row + 1] && weight.block_columns[block] < wanted) ++block;
    if (block == weight.offsets[block_row + 1] || weight.block_columns[block] != wanted) return true;
  }
  return false;
}

template <class Isa>
inline void block_row(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t tokens,
                      int64_t block_row) {
  int64_t token = 0;
  for (; token + 2 <= tokens; token += 2) block_row_tokens<Isa, 2>(weight, in, out, token, block_row);
  if (token < tokens) block_row_tokens<Isa, 1>(weight, in, out, token, block_row);
  for (token = 0; token < tokens; ++token) {
    if (in.scales[token] == 0) continue;  // all inputs of this token are finite
    if (misses_not_finite<Isa>(weight, static_cast<const typename Isa::X*>(in.x) + token * in.stride, block_row))
      for (int64_t row = 0; row < weight.block_rows; ++row)
        store_inside(weight, out, token, block_row * weight.block_rows + row, NAN);
  }
}
