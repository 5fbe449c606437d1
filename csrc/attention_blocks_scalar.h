// Vectors of eight in plain C++ for attention_blocks.h.
#pragma once

#include "attention_blocks.h"
#include "attention_scalar.h"

namespace {

struct BlocksPlain : AttentionPlain {
  static constexpr int kVectors = 2;
  static F add(const F& a, const F& b) {
    return each([&](int i) { return a.at[i] + b.at[i]; });
  }
  static F larger(const F& a, const F& b) {
    return each([&](int i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; });
  }
  static float largest(const F& x) {
    float best = x.at[0];
    for (float one : x.at) best = one > best ? one : best;
    return best;
  }
  static float total(const F& x) {
    float sum = 0;
    for (float one : x.at) sum += one;
    return sum;
  }
  static F first(const F& x, int64_t count, float others) {
    return each([&](int i) { return i < count ? x.at[i] : others; });
  }
  static F exponential(const F& x) {
    return each([&](int i) { return ::exponential(x.at[i]); });
  }
};

}  // namespace
