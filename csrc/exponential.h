// e^x in plain arithmetic, which the compiler turns into vectors. Internal linkage, as in numbers.h.
#pragma once

#include <stdint.h>
#include <string.h>

namespace {

// e^x, within two units in the last place; 1e-38 and 2e38 at the ends. A NaN stays one.
inline float exponential(float x) {
  x = x < -87.3f ? -87.3f : x;
  x = x > 88.3f ? 88.3f : x;
  const float shifter = 12582912.0f;  // adding it rounds to whole numbers
  const float shifted = x * 1.44269504f + shifter;
  const float n = shifted - shifter;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  memcpy(&bits, &shifted, 4);
  bits = (bits + 127) << 23;  // n is in the low bits of `shifted`, also where a NaN has no whole number
  float power;
  memcpy(&power, &bits, 4);
  return p * power;
}

}  // namespace
