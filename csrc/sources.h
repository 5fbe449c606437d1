// Part of gemv.h: included there, within its namespace.
// ---- where the weights of a tile come from: `floats` and `bytes` give them row by row, group by group

// Kept values one after another. `Safe` never reads beyond the last value, and is slower.
template <class Isa, bool Safe>
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

  inline void floats(int64_t group, int row, typename Isa::Floats& low, typename Isa::Floats& high) {
    const uint64_t mask = load_word(masks + (group * kTileRows + row) * 8);
    const auto* at = static_cast<const uint16_t*>(values);
    const int first = __builtin_popcountll(mask & 0xffffffffu);
    const int all = __builtin_popcountll(mask);
    if (Safe) {
      uint16_t copy[96] = {};
      memcpy(copy, at, size_t(all) * 2);
      low = Isa::expand_floats(uint32_t(mask), copy);
      high = Isa::expand_floats(uint32_t(mask >> 32), copy + first);
    } else {
      low = Isa::expand_floats(uint32_t(mask), at);
      high = Isa::expand_floats(uint32_t(mask >> 32), at + first);
    }
    values = at + all;
  }

  inline typename Isa::Bytes bytes(int64_t group, int row) {
    const uint64_t mask = load_word(masks + (group * kTileRows + row) * 8);
    const auto* at = static_cast<const int8_t*>(values);
    const int all = __builtin_popcountll(mask);
    values = at + all;
    if (Safe) {
      int8_t copy[128] = {};
      memcpy(copy, at, size_t(all));
      return Isa::expand_bytes(mask, copy);
    }
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

  inline void floats(int64_t group, int row, typename Isa::Floats& low, typename Isa::Floats& high) {
    const int64_t place = group * kTileRows + row;
    const uint64_t mask = load_word(masks + place * 8);
    const auto* at = static_cast<const uint16_t*>(values) + place * (kGroup / 2);
    __builtin_prefetch(at + kAhead / 2);
    low = Isa::expand_half_floats(uint32_t(mask), at);
    high = Isa::expand_half_floats(uint32_t(mask >> 32), at + 16);
  }

  inline typename Isa::Bytes bytes(int64_t group, int row) {
    const int64_t place = group * kTileRows + row;
    const auto* at = static_cast<const int8_t*>(values) + place * (kGroup / 2);
    __builtin_prefetch(at + kAhead);
    return Isa::expand_half_bytes(load_word(masks + place * 8), at);
  }
};
