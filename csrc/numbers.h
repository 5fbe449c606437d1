// bfloat16 and unaligned words. Everything has internal linkage: each file is compiled for another processor.
#pragma once

#include <stdint.h>
#include <string.h>

namespace {

inline float to_float(uint16_t bits) {
  uint32_t word = uint32_t(bits) << 16;
  float value;
  memcpy(&value, &word, 4);
  return value;
}

// Round to nearest, ties to even; a NaN stays one.
inline uint16_t to_bfloat16(float value) {
  uint32_t word;
  memcpy(&word, &value, 4);
  if ((word & 0x7fffffffu) > 0x7f800000u) return uint16_t(word >> 16 | 0x40);
  return uint16_t((word + 0x7fffu + (word >> 16 & 1)) >> 16);
}

inline uint64_t load_word(const uint8_t* at) {
  uint64_t word;
  memcpy(&word, at, 8);
  return word;
}

inline uint32_t load_half(const uint8_t* at) {
  uint32_t half;
  memcpy(&half, at, 4);
  return half;
}

}  // namespace
