// Part of gemv.h: included there, within its namespace.
// ---- where the weights of a tile come from: `floats` and `bytes` give them row by row, group by group

// Kept values one after another.
template <class Isa>
struct Masked {
  const uint8_t* masks;
  const void* values;
  const void* end;

  Masked(const SparityMatrix& weight, int64_t tile, int64_t element)
      : masks(weight.masks + tile * ((weight.columns + kGroup - 1) / kGroup) * kTileRows * 8),
        values(static_cast<const char*>(weight.values) + weight.offsets[tile] * element),
        end(static_cast<const char*>(weight.values) + weight.kept * element) {}

  inline void ahead(int element) const {  // as many values of either size: half of a group's, in whole lines
    __builtin_prefetch(masks + kAhead / 4);
    for (int line = 0; line < 2 * element; ++line)
      __builtin_prefetch(static_cast<const char*>(values) + kAhead / 2 * element + 64 * line);
  }

  // Whether whole vectors may be read for all rows of the next group: nothing beyond the last value is ever read.
  inline bool has_room(int element) const {
    return static_cast<const char*>(values) + kTileRows * kGroup * element <= end;
  }

  inline void floats(int64_t group, int row, bool room, typename Isa::Floats& low, typename Isa::Floats& high) {
    const uint8_t* mask = masks + (group * kTileRows + row) * 8;
    const uint32_t first_mask = load_half(mask);
    const auto* at = static_cast<const uint16_t*>(values);
    const int64_t first = __builtin_popcountll(first_mask), all = __builtin_popcountll(load_word(mask));
    uint16_t copy[96];
    values = at + all;
    if (!room) at = static_cast<const uint16_t*>(memcpy(copy, at, size_t(all) * 2));
    low = Isa::expand_floats(first_mask, at);
    high = Isa::expand_floats(load_half(mask + 4), at + first);
  }

  inline typename Isa::Bytes bytes(int64_t group, int row, bool room) {
    const uint64_t mask = load_word(masks + (group * kTileRows + row) * 8);
    const auto* at = static_cast<const int8_t*>(values);
    const int64_t all = __builtin_popcountll(mask);
    int8_t copy[128];
    values = at + all;
    if (!room) at = static_cast<const int8_t*>(memcpy(copy, at, size_t(all)));
    return Isa::expand_bytes(mask, at);
  }
};

// Two values of every four, each at its own place.
template <class Isa>
struct Paired {
  const uint8_t* masks;
  const void* values;

  Paired(const SparityMatrix& weight, int64_t tile, int64_t element) {
    const int64_t groups = (weight.columns + kGroup - 1) / kGroup;
    masks = weight.masks + tile * groups * kTileRows * 8;
    values = static_cast<const char*>(weight.values) + tile * groups * kTileRows * (kGroup / 2) * element;
  }

  inline void ahead(int) const {}
  inline bool has_room(int) const { return true; }

  inline void floats(int64_t group, int row, bool, typename Isa::Floats& low, typename Isa::Floats& high) {
    const int64_t place = group * kTileRows + row;
    const uint64_t mask = load_word(masks + place * 8);
    const auto* at = static_cast<const uint16_t*>(values) + place * (kGroup / 2);
    __builtin_prefetch(at + kAhead / 2);
    low = Isa::expand_half_floats(uint32_t(mask), at);
    high = Isa::expand_half_floats(uint32_t(mask >> 32), at + 16);
  }

  inline typename Isa::Bytes bytes(int64_t group, int row, bool) {
    const int64_t place = group * kTileRows + row;
    const auto* at = static_cast<const int8_t*>(values) + place * (kGroup / 2);
    __builtin_prefetch(at + kAhead);
    return Isa::expand_half_bytes(load_word(masks + place * 8), at);
  }
};
