// How numbers of a cache come out of memory: vectors of float32, several of them from one load.
#pragma once

#include "numbers.h"

namespace {

// A load gives kPer vectors: lane i of vector s holds number kPer * i + s of those that were loaded. What meets them is
// put in the same order first (`spread`), and what comes of them back (`gather`).
template <class I>
struct Floats32 {
  static constexpr int kPer = 1;
  static constexpr bool kCoded = false;
  using Raw = typename I::F;
  static int64_t bytes(int64_t numbers) { return numbers * 4; }
  static inline Raw load(const uint8_t* from) { return I::load(reinterpret_cast<const float*>(from)); }
  template <int>
  static inline typename I::F vector(const Raw& raw) {
    return raw;
  }
};

template <class I>
struct Floats16 {
  static constexpr int kPer = 2;
  static constexpr bool kCoded = false;
  using Raw = typename I::W;
  static int64_t bytes(int64_t numbers) { return numbers * 2; }
  static inline Raw load(const uint8_t* from) { return I::load_words(from); }
  template <int Part>
  static inline typename I::F vector(const Raw& raw) {
    return Part ? I::upper(raw) : I::lower(raw);
  }
};

// Codes of Bits bits, the lowest first.
template <class I, int Bits>
struct Codes {
  static constexpr int kPer = 8 / Bits;
  static constexpr bool kCoded = true;
  using Raw = typename I::W;
  static int64_t bytes(int64_t numbers) { return numbers * Bits / 8; }
  static inline Raw load(const uint8_t* from) { return I::widen_bytes(from); }
  template <int Part>
  static inline typename I::F vector(const Raw& raw) {
    return I::template code<Bits, Part * Bits>(raw);
  }
};

template <class I, int Per>
inline void spread(const float* in, int64_t width, float* out) {
  for (int64_t at = 0; at < width; at += I::kLanes * Per)
    for (int part = 0; part < Per; ++part)
      for (int lane = 0; lane < I::kLanes; ++lane) out[at + part * I::kLanes + lane] = in[at + Per * lane + part];
}

template <class I, int Per>
inline void gather(const float* in, int64_t width, float* out) {
  for (int64_t at = 0; at < width; at += I::kLanes * Per)
    for (int part = 0; part < Per; ++part)
      for (int lane = 0; lane < I::kLanes; ++lane) out[at + Per * lane + part] = in[at + part * I::kLanes + lane];
}

inline float number_at(const void* from, int32_t type, int64_t at) {
  return type == SPARITY_FLOAT32 ? static_cast<const float*>(from)[at] : to_float(static_cast<const uint16_t*>(from)[at]);
}

inline void numbers_at(const void* from, int32_t type, int64_t at, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = number_at(from, type, at + i);
}

}  // namespace
