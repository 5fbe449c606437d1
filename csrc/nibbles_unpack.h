// Part of nibbles.h: included there, within its namespace.
// ---- unpacking: weights as bfloat16; 0.0f makes +0 of the -0 that a negative scale gives

// `values` of one row, as they are stored, one in a byte -> out; `column` is the first one's.
inline void scale_values(const SparityMatrix& weight, int64_t row, int64_t column, int64_t count, const uint8_t* values,
                         uint16_t* out) {
  const int64_t groups = weight.columns / weight.group;
  for (int64_t at = 0; at < count; at += 32) {
    const int64_t group = row * groups + (column + at) / weight.group;
    const int zero = weight.zeros ? weight.zeros[group] : 8;
    const float scale = scale_of(weight, group);
    for (int64_t i = at; i < at + 32 && i < count; ++i)
      out[i] = to_bfloat16(float(((values[i] + zero) & 15) - zero) * scale + 0.0f);
  }
}

template <class Isa, class Source>
inline void unpack_fours_from(const SparityMatrix& weight, int64_t tile, int64_t rows, uint16_t* out) {
  Source source(weight, tile * kTileRows, 0);
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

// Of the format columns: the rows' half bytes lie in each channel.
inline void unpack_fours_columns(const SparityMatrix& weight, int64_t tile, int64_t rows, uint16_t* out) {
  const int64_t across = (weight.rows + 1) / 2;
  const auto* bytes = static_cast<const uint8_t*>(weight.values) + tile * kTileRows / 2;
  for (int64_t column = 0; column < weight.columns; ++column) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t place = column / weight.group * weight.rows + tile * kTileRows + r;
      const int zero = weight.zeros ? weight.zeros[place] : 8;
      const int value = bytes[column * across + r / 2] >> 4 * (r % 2) & 15;
      const float scale = scale_of(weight, place);
      out[r * weight.columns + column] = to_bfloat16(float(((value + zero) & 15) - zero) * scale + 0.0f);
    }
  }
}

template <class Isa>
void unpack_fours(const SparityMatrix& weight, int64_t tile, int64_t rows, uint16_t* out) {
  if (weight.format == SPARITY_COLUMNS) return unpack_fours_columns(weight, tile, rows, out);
  if (weight.format == SPARITY_BITMASK)
    return unpack_fours_from<Isa, MaskedFours<Isa, kTileRows, 1>>(weight, tile, rows, out);
  if (weight.format == SPARITY_TWO_OF_FOUR)
    return unpack_fours_from<Isa, PairedFours<Isa, kTileRows, 1>>(weight, tile, rows, out);
  for (int64_t r = 0; r < rows; ++r) {
    const auto* bytes = static_cast<const uint8_t*>(weight.values) + (tile * kTileRows + r) * (weight.columns / 2);
    for (int64_t column = 0; column < weight.columns; column += 32) {
      uint8_t values[32];
      for (int64_t i = 0; i < 16; ++i) {
        values[2 * i] = bytes[column / 2 + i] & 15;
        values[2 * i + 1] = bytes[column / 2 + i] >> 4;
      }
      scale_values(weight, tile * kTileRows + r, column, 32, values, out + r * weight.columns + column);
    }
  }
}
