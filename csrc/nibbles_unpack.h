// Part of nibbles.h: included there, within its namespace.
// ---- unpacking: weights as bfloat16; 0.0f makes +0 of the -0 that a negative scale gives

// `values` of one row, as they are stored, one in a byte -> out; `column` is the first one's.
inline void scale_values(const SparityMatrix& weight, int64_t row, int64_t column, int64_t count, const uint8_t* values,
                         uint16_t* out) {
  for (int64_t at = 0; at < count; at += 32) {
    const int64_t group = side_of(weight, row, (column + at) / weight.group);
    const int zero = weight.zeros ? weight.zeros[group] : 8;
    const float scale = scale_of(weight, group);
    for (int64_t i = at; i < at + 32 && i < count; ++i)
      out[i] = to_bfloat16(float(((values[i] + zero) & 15) - zero) * scale + 0.0f);
  }
}

template <class Isa, class Source>
inline void unpack_fours_from(const SparityMatrix& weight, int64_t tile, int64_t rows, uint16_t* out) {
  Source source(weight, tile * kTileRows);
  for (int64_t column = 0; column < weight.columns; column += kGroup) {
    const int64_t count = weight.columns - column < kGroup ? weight.columns - column : kGroup;
    source.begin(column);
    for (int r = 0; r < kTileRows; ++r) {  // also rows beyond the end: a stream must be read on
      uint8_t values[kGroup];
      const auto codes =
          source.has_room(column) ? source.template codes<true>(column, r) : source.template codes<false>(column, r);
      Isa::Fours::store(codes, values);
      if (r < rows) scale_values(weight, tile * kTileRows + r, column, count, values, out + r * weight.columns + column);
    }
  }
}

// Rows [begin, end) of the format columns, at most kUnpacked of them: the rows' half bytes lie in each channel. begin is even.
constexpr int64_t kUnpacked = 128;

inline void unpack_fours_columns(const SparityMatrix& weight, int64_t begin, int64_t end, uint16_t* out) {
  const int64_t across = (weight.rows + 1) / 2, rows = end - begin;
  const auto* bytes = static_cast<const uint8_t*>(weight.values) + begin / 2;
  float scales[kUnpacked + sparity::kScaleLanes];
  uint16_t turned[32][kUnpacked + 2];
  for (int64_t column = 0; column < weight.columns; column += 32) {
    const int64_t first = column / weight.group * weight.rows + begin;
    load_scales(weight, first, rows, scales);
    for (int64_t i = 0; i < 32; ++i) {
      const uint8_t* from = bytes + (column + i) * across;
      for (int64_t r = 0; r < rows; ++r) {
        const int zero = weight.zeros ? weight.zeros[first + r] : 8;
        const int value = from[r / 2] >> 4 * (r % 2);
        turned[i][r] = to_bfloat16(float(((value + zero) & 15) - zero) * scales[r] + 0.0f);
      }
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < 32; ++i) out[r * weight.columns + column + i] = turned[i][r];
  }
}

template <class Isa>
void unpack_fours(const SparityMatrix& weight, int64_t tile, int64_t rows, uint16_t* out) {
  if (weight.format == SPARITY_COLUMNS)
    return unpack_fours_columns(weight, tile * kTileRows, tile * kTileRows + rows, out);
  if (weight.format == SPARITY_BITMASK)
    return unpack_fours_from<Isa, MaskedFours<Isa, kTileRows, 1>>(weight, tile, rows, out);
  const auto codes = weight.format == SPARITY_DENSE ? dense_codes : paired_codes;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t column = 0; column < weight.columns; column += 32) {
      uint8_t values[32];
      codes(weight, tile * kTileRows + r, column, values);
      scale_values(weight, tile * kTileRows + r, column, 32, values, out + r * weight.columns + column);
    }
  }
}
