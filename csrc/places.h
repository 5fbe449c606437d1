// For each mask of eight: the place in the list of kept values that each weight takes; 0x80 where there is none.
#pragma once

#include <stdint.h>

namespace {

struct Places {
  uint64_t of[256];
  constexpr Places() : of() {
    for (int mask = 0; mask < 256; ++mask) {
      uint64_t word = 0, next = 0;
      for (int bit = 0; bit < 8; ++bit) word |= (mask >> bit & 1 ? next++ : uint64_t(0x80)) << 8 * bit;
      of[mask] = word;
    }
  }
};
constexpr Places kPlaces;

}  // namespace
