// Byte shuffles that spread kept values over eight places, by the mask of the eight. Included by isa_256.h inside its
// namespace. A shuffle stays within half a register.

#include "float_places.h"

// Values of 1 byte, in both halves -> the upper bytes of sixteen int16, which is 256 times the value. The entries of the
// first and of the second eight are added: the first one's upper half is how many values the second one's come after.
template <bool Second>
struct BytePlaces {
  alignas(kEntry) uint8_t of[256][kEntry];
  constexpr BytePlaces() : of() {
    for (int mask = 0; mask < 256; ++mask) {
      int next = 0;
      for (int bit = 0; bit < 8; ++bit) {
        const bool kept = mask >> bit & 1;
        of[mask][2 * bit + 16 * Second] = kNothing;
        of[mask][2 * bit + 16 * Second + 1] = kept ? uint8_t(next) : kNothing;
        next += kept;
      }
      for (int place = 0; place < 8 && !Second; ++place) of[mask][16 + 2 * place + 1] = uint8_t(next);
    }
  }
};
constexpr BytePlaces<false> kFirstBytes;
constexpr BytePlaces<true> kSecondBytes;

// The entry of eight number `Eight` of a mask. One rotation leaves the mask as it is; a shift would need a copy first.
template <int Eight>
inline uint64_t entry_of(uint64_t mask) {
  uint64_t turned;
  asm("rorx %2, %1, %0" : "=r"(turned) : "r"(mask), "i"((8 * Eight - 5) & 63));
  return turned & 255 * kEntry;
}

inline __m256i load_entry(const uint8_t (&table)[256][kEntry], uint64_t entry) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(&table[0][0] + entry));
}
