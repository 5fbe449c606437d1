// Part of nibbles.h: included there, within its namespace.
// ---- where the codes of a step come from

// Kept values one after another; `Parts` groups of 64 columns at a time.
template <class Isa, int Rows, int Parts>
struct MaskedFours {
  using Fours = typename Isa::Fours;
  static constexpr int64_t kStep = kGroup, kReach = 64;  // bytes that are read at once
  const uint8_t *masks, *values, *end;
  uint64_t place;  // of the next value, counted from `values`

  MaskedFours(const SparityMatrix& weight, int64_t row)
      : masks(weight.masks + row / kTileRows * ((weight.columns + kGroup - 1) / kGroup) * kTileRows * 8),
        values(static_cast<const uint8_t*>(weight.values)),
        end(values + (weight.kept + 1) / 2),
        place(uint64_t(weight.offsets[row / kTileRows])) {}

  inline bool has_room(int64_t) const { return values + place / 2 + Parts * kTileRows * kGroup / 2 + kReach <= end; }
  inline void begin(int64_t) {
    __builtin_prefetch(masks + kAhead / 4);
    __builtin_prefetch(values + place / 2 + kAhead / 4);
    __builtin_prefetch(values + place / 2 + kAhead / 4 + 64);
  }
  template <bool Room>
  inline typename Fours::Codes codes(int64_t, int) {
    const uint64_t mask = load_word(masks), kept = uint64_t(__builtin_popcountll(mask));
    const uint8_t* at = values + place / 2;
    const uint64_t odd = place & 1;
    masks += 8;
    place += kept;
    if (Room) return Fours::spread(mask, at, odd);
    uint8_t copy[kReach] = {};
    memcpy(copy, at, size_t(odd + kept + 1) / 2);
    return Fours::spread(mask, copy, odd);
  }
};
