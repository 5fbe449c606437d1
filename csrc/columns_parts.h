// How a product by input channel is cut into ranges of channels and tiles of rows. Part of inputs.h: included there,
// within its namespace.

// Channels are cut into ranges by the shape alone: a range reads long stretches of memory even where channels are short,
// and several threads find work, of which one that is held up leaves some to the others.
int64_t column_parts(const SparityMatrix& weight) {
  constexpr int64_t kLong = 65536, kLeast = 256;  // bytes of a channel, channels of a range
  const int64_t bytes = weight.group ? (weight.rows + 1) / 2 : weight.scales ? weight.rows : 2 * weight.rows;
  int64_t parts = 1;
  while (parts < sparity::kMostParts && parts * bytes < kLong && 2 * parts * kLeast <= weight.columns) parts *= 2;
  return parts;
}

// Rows of a tile in the format columns: long stretches of a channel, as many tiles as keep all threads at work.
int64_t column_rows(const SparityMatrix& weight, int64_t tokens, int64_t parts, int threads) {
  const int64_t line = weight.group ? sparity::kMostLine : 64;
  const int64_t share = tokens <= 2 ? 2 : tokens <= 4 ? 4 : tokens <= 8 && !weight.scales ? 8 : weight.scales ? 16 : 32;
  const int64_t most = sparity::kMostSums / share;
  const int64_t tiles = round_up((weight.rows + most - 1) / most, threads / std::__gcd(int64_t(threads), parts));
  return std::max(line, std::min(most, round_up((weight.rows + tiles - 1) / tiles, line)));
}

// Memory for the ranges of a weight, from `at` on, and what they are; gives the bytes.
uintptr_t prepare_parts(const SparityMatrix& weight, int64_t tokens, int threads, uintptr_t at, sparity::Inputs* in) {
  const int64_t parts = column_parts(weight), rows = column_rows(weight, tokens, parts, threads);
  const int64_t sums = parts > 1 ? parts * tokens * round_up(weight.rows, sparity::kMostLine) * 4 : 0;
  const int64_t tiles = round_up(weight.rows, rows) / rows;
  if (in) {
    in->tile_rows = rows;
    in->parts = parts;
    in->partial = reinterpret_cast<void*>(at);
    in->done = reinterpret_cast<int32_t*>(at + uintptr_t(sums));
    memset(in->done, 0, size_t(tiles) * 4);
    const int64_t step = std::max(weight.group, sparity::kChannels);
    for (int64_t part = 0; part <= parts; ++part) {
      const int64_t column = std::min(round_up(weight.columns * part / parts, step), weight.columns);
      in->begins[part] = weight.group ? column / weight.group
                                      : std::lower_bound(in->channels, in->channels + in->count, column) - in->channels;
    }
  }
  return uintptr_t(sums + round_up(tiles * 4, 64));
}
