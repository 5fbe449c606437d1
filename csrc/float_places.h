// Byte shuffles that spread kept bfloat16 over eight float32, by the mask of the eight. Included inside the namespaces of
// instruction sets.

constexpr int kEntry = 32;           // bytes of an entry of every table
constexpr uint8_t kNothing = 0x80;  // a shuffle makes it 0

// Values of 2 bytes, in both halves -> the upper halves of eight float32, which is what bfloat16 is.
struct FloatPlaces {
  alignas(kEntry) uint8_t of[256][kEntry];
  constexpr FloatPlaces() : of() {
    for (int mask = 0; mask < 256; ++mask)
      for (int bit = 0, next = 0; bit < 8; ++bit) {
        const bool kept = mask >> bit & 1;
        of[mask][4 * bit] = of[mask][4 * bit + 1] = kNothing;
        of[mask][4 * bit + 2] = kept ? uint8_t(2 * next) : kNothing;
        of[mask][4 * bit + 3] = kept ? uint8_t(2 * next + 1) : kNothing;
        next += kept;
      }
  }
};
constexpr FloatPlaces kFloatPlaces;
