// Vectors of eight in plain C++ for attention.h.
#pragma once

#include "attention.h"

namespace {

struct AttentionPlain {
  struct F {
    float at[8];
  };
  struct W {
    uint32_t at[8];
  };
  static constexpr int kLanes = 8, kTile = 8;

  template <class Each>
  static F each(const Each& one) {
    F out;
    for (int i = 0; i < kLanes; ++i) out.at[i] = one(i);
    return out;
  }
  static float number(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
  }

  static F zero() { return set(0); }
  static F set(float x) {
    return each([&](int) { return x; });
  }
  static F halves(float lower, float upper) {
    return each([&](int i) { return i < kLanes / 2 ? lower : upper; });
  }
  static F load(const float* from) {
    return each([&](int i) { return from[i]; });
  }
  static void store(float* to, const F& x) { memcpy(to, x.at, sizeof x.at); }
  static F fma(const F& a, const F& b, const F& c) {
    return each([&](int i) { return a.at[i] * b.at[i] + c.at[i]; });
  }
  static W load_words(const uint8_t* from) {
    W out;
    memcpy(out.at, from, sizeof out.at);
    return out;
  }
  static F lower(const W& words) {
    return each([&](int i) { return number(words.at[i] << 16); });
  }
  static F upper(const W& words) {
    return each([&](int i) { return number(words.at[i] & 0xffff0000u); });
  }
  static W widen_bytes(const uint8_t* from) {
    W out;
    for (int i = 0; i < kLanes; ++i) out.at[i] = from[i];
    return out;
  }
  template <int Bits, int Shift>
  static F code(const W& bytes) {
    return each([&](int i) { return float(bytes.at[i] >> Shift & ((1u << Bits) - 1)); });
  }
  static void totals(const F (&x)[8], float* out) {
    for (int i = 0; i < 8; ++i) {
      float sum = 0;
      for (int lane = 0; lane < kLanes; ++lane) sum += x[i].at[lane];
      out[i] = sum;
    }
  }
};

}  // namespace
