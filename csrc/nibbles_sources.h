// Part of nibbles.h: included there, within its namespace.
// ---- where the codes of a step come from

// Rows as they lie, `Rows` of them from `row` on; those beyond the matrix repeat the last one.
template <class Isa, int Rows, int Parts>
struct WholeFours {
  using Fours = typename Isa::Fours;
  const uint8_t* rows[Rows];
  const uint8_t* end;  // of the matrix
  int64_t columns, later;

  WholeFours(const SparityMatrix& weight, int64_t row, int64_t ahead)
      : end(static_cast<const uint8_t*>(weight.values) + weight.rows * (weight.columns / 2)),
        columns(weight.columns),
        later(ahead) {
    for (int r = 0; r < Rows; ++r) {
      const int64_t at = row + r < weight.rows ? row + r : weight.rows - 1;
      rows[r] = static_cast<const uint8_t*>(weight.values) + at * (columns / 2);
    }
  }

  static constexpr int64_t kStep = Fours::kPairs;
  static constexpr bool kPaired = true;
  // A last step may read into the next row: inputs beyond the columns are 0.
  inline bool has_room(int64_t column) const { return rows[Rows - 1] + (column + Parts * kStep) / 2 <= end; }
  inline void begin(int64_t) {}
  template <bool Room>
  inline typename Fours::Pairs codes(int64_t column, int r) {
    const uint8_t* at = rows[r] + column / 2;
    __builtin_prefetch(at + later);
    if (Room || column + kStep <= columns) return Fours::load_pairs(at);
    uint8_t copy[kMostPairs / 2] = {};
    memcpy(copy, at, size_t(columns - column) / 2);
    return Fours::load_pairs(copy);
  }
};

// Kept values one after another; `Parts` groups of 64 columns at a time.
template <class Isa, int Rows, int Parts>
struct MaskedFours {
  using Fours = typename Isa::Fours;
  static constexpr int64_t kStep = kGroup, kReach = 64;  // bytes that are read at once
  static constexpr bool kPaired = false;
  const uint8_t *masks, *values, *end;
  uint64_t place;  // of the next value, counted from `values`

  MaskedFours(const SparityMatrix& weight, int64_t row, int64_t)
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

// Two values of every four: 16 bytes for 64 columns.
template <class Isa, int Rows, int Parts>
struct PairedFours {
  using Fours = typename Isa::Fours;
  static constexpr int64_t kStep = kGroup, kBytes = kGroup / 4;
  static constexpr bool kPaired = false;
  const uint8_t *masks, *values;

  PairedFours(const SparityMatrix& weight, int64_t row, int64_t) {
    const int64_t places = row / kTileRows * ((weight.columns + kGroup - 1) / kGroup) * kTileRows;
    masks = weight.masks + places * 8;
    values = static_cast<const uint8_t*>(weight.values) + places * kBytes;
  }

  inline bool has_room(int64_t) const { return true; }
  inline void begin(int64_t) {
    __builtin_prefetch(masks + kAhead / 4);
    __builtin_prefetch(values + kAhead / 2);
  }
  template <bool>
  inline typename Fours::Codes codes(int64_t, int) {
    const uint64_t mask = load_word(masks);
    const uint8_t* at = values;
    masks += 8;
    values += kBytes;
    return Fours::spread_half(mask, at);
  }
};
