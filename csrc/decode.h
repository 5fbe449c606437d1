// The small operations between the products of one decoding step: norms, attention over a cache, gated activations.
// Everything is bfloat16 in memory and float32 in between, rounded where PyTorch's modules round. Plain loops over arrays
// of lanes, which each instruction set's compiler flags turn into vectors; so everything has internal linkage.
#pragma once

#include <math.h>

#include "decode_kernels.h"
#include "exponential.h"
#include "numbers.h"

namespace {

constexpr int kLanes = 16;
constexpr int kKeys = 64;     // keys that are scored at a time
constexpr int kQueries = 8;   // query heads that read the same keys at a time
constexpr int kMostWidth = 512;

inline float lanes_sum(const float* lanes) {
  float half[kLanes / 2];
  for (int i = 0; i < kLanes / 2; ++i) half[i] = lanes[i] + lanes[i + kLanes / 2];
  return ((half[0] + half[4]) + (half[2] + half[6])) + ((half[1] + half[5]) + (half[3] + half[7]));
}

inline float rounded(float value) { return to_float(to_bfloat16(value)); }

// out = weight * bfloat16(x / rms(x)); out may be x.
inline void normalize(const uint16_t* x, const uint16_t* weight, float epsilon, int64_t columns, uint16_t* out) {
  float squares[kLanes] = {};
  int64_t column = 0;
  for (; column + kLanes <= columns; column += kLanes)
    for (int i = 0; i < kLanes; ++i) {
      const float value = to_float(x[column + i]);
      squares[i] += value * value;
    }
  float sum = lanes_sum(squares);
  for (; column < columns; ++column) sum += to_float(x[column]) * to_float(x[column]);
  const float scale = 1.0f / sqrtf(sum / float(columns) + epsilon);
  for (column = 0; column < columns; ++column)
    out[column] = to_bfloat16(to_float(weight[column]) * rounded(to_float(x[column]) * scale));
}

void rms_norm(uint16_t* x, const uint16_t* add, const uint16_t* weight, float epsilon, int64_t columns, uint16_t* out) {
  if (add)
    for (int64_t column = 0; column < columns; ++column)
      x[column] = to_bfloat16(to_float(x[column]) + to_float(add[column]));
  normalize(x, weight, epsilon, columns, out);
}

void silu(const uint16_t* gates, int64_t count, uint16_t* out) {
  for (int64_t at = 0; at < count; ++at) {
    const float value = to_float(gates[at]);
    out[at] = to_bfloat16(value / (1.0f + exponential(-value)));
  }
}

void gate(const uint16_t* gates, const uint16_t* ups, int64_t count, uint16_t* out) {
  for (int64_t at = 0; at < count; ++at) {
    const float value = to_float(gates[at]);
    out[at] = to_bfloat16(rounded(value / (1.0f + exponential(-value))) * to_float(ups[at]));
  }
}

#include "skip.h"

// Rotary positions, each product and sum rounded; first half against second half. `out` is not `x`.
inline void rotate(const uint16_t* x, const uint16_t* cos, const uint16_t* sin, int64_t width, uint16_t* out) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float first = to_float(x[i]), second = to_float(x[i + half]);
    out[i] = to_bfloat16(rounded(first * to_float(cos[i])) - rounded(second * to_float(sin[i])));
    out[i + half] = to_bfloat16(rounded(second * to_float(cos[i + half])) + rounded(first * to_float(sin[i + half])));
  }
}

inline void normed_and_rotated(const SparityAttention& a, const uint16_t* x, const uint16_t* norm, int64_t token,
                               uint16_t* out) {
  uint16_t normed[kMostWidth];
  if (norm) {
    normalize(x, norm, a.epsilon, a.width, normed);
    x = normed;
  }
  rotate(x, a.cos + token * a.width, a.sin + token * a.width, a.width, out);
}

// scores[q][key] for `count` keys.
template <int Queries>
inline void score(const float* queries, const uint16_t* keys, int64_t width, int count, float scale,
                  float (*scores)[kKeys]) {
  for (int key = 0; key < count; ++key) {
    float parts[Queries][kLanes] = {};
    for (int64_t at = 0; at < width; at += kLanes) {
      float k[kLanes];
      for (int i = 0; i < kLanes; ++i) k[i] = to_float(keys[key * width + at + i]);
      for (int q = 0; q < Queries; ++q)
        for (int i = 0; i < kLanes; ++i) parts[q][i] += k[i] * queries[q * width + at + i];
    }
    for (int q = 0; q < Queries; ++q) scores[q][key] = lanes_sum(parts[q]) * scale;
  }
}

// sums[q] = sums[q] * keep[q] + weights[q] @ values
template <int Queries>
inline void accumulate(const float (*weights)[kKeys], const uint16_t* values, int64_t width, int count,
                       const float* keep, float* sums) {
  for (int64_t at = 0; at < width; at += kLanes) {
    float parts[Queries][kLanes];
    for (int q = 0; q < Queries; ++q)
      for (int i = 0; i < kLanes; ++i) parts[q][i] = sums[q * width + at + i] * keep[q];
    for (int key = 0; key < count; ++key) {
      float v[kLanes];
      for (int i = 0; i < kLanes; ++i) v[i] = to_float(values[key * width + at + i]);
      for (int q = 0; q < Queries; ++q)
        for (int i = 0; i < kLanes; ++i) parts[q][i] += weights[q][key] * v[i];
    }
    for (int q = 0; q < Queries; ++q)
      for (int i = 0; i < kLanes; ++i) sums[q * width + at + i] = parts[q][i];
  }
}

// One head of a row's cache.
struct Keys {
  const uint16_t *keys, *values;  // [length, width]
  float* mass;                    // [length], or null
  int64_t length;
  const uint8_t* visible;  // [visible_keys], or null
  int64_t visible_keys;
};

// scores[q][key] for `count` keys from `first` on; -infinity where a key is not seen.
template <int Queries>
inline void visible_scores(const SparityAttention& a, const float* queries, const Keys& seen, int64_t first, int count,
                           float (*scores)[kKeys]) {
  score<Queries>(queries, seen.keys + first * a.width, a.width, count, a.scale, scores);
  if (!seen.visible) return;
  for (int i = 0; i < Queries; ++i)
    for (int key = 0; key < count && first + key < seen.visible_keys; ++key)
      if (!seen.visible[first + key]) scores[i][key] = -INFINITY;
}

// Adds the softmax weights of `Queries` query heads to each key's mass; `share` is one over a query's total.
template <int Queries>
inline void add_mass(const SparityAttention& a, const float* queries, const Keys& seen, const float* highest,
                     const float* share) {
  alignas(64) float scores[Queries][kKeys];
  for (int64_t first = 0; first < seen.length; first += kKeys) {
    const int count = int(seen.length - first < kKeys ? seen.length - first : kKeys);
    visible_scores<Queries>(a, queries, seen, first, count, scores);
    for (int key = 0; key < count; ++key) {
      float sum = 0;
      for (int i = 0; i < Queries; ++i)
        sum += scores[i][key] == -INFINITY ? 0.0f : exponential(scores[i][key] - highest[i]) * share[i];
      seen.mass[first + key] += sum;
    }
  }
}

// Attention of `Queries` query heads over one key and value head; softmax over the keys as they come.
template <int Queries>
void attend_queries(const SparityAttention& a, const uint16_t* q, const Keys& seen, int64_t token, uint16_t* out) {
  alignas(64) float queries[Queries * kMostWidth], sums[Queries * kMostWidth] = {};
  alignas(64) float scores[Queries][kKeys];
  float highest[Queries], total[Queries], keep[Queries], share[Queries];
  for (int i = 0; i < Queries; ++i) {
    uint16_t rotated[kMostWidth];
    normed_and_rotated(a, q + i * a.width, a.query_norm, token, rotated);
    for (int64_t at = 0; at < a.width; ++at) queries[i * a.width + at] = to_float(rotated[at]);
    highest[i] = -INFINITY;
    total[i] = 0;
  }
  for (int64_t first = 0; first < seen.length; first += kKeys) {
    const int count = int(seen.length - first < kKeys ? seen.length - first : kKeys);
    visible_scores<Queries>(a, queries, seen, first, count, scores);
    for (int i = 0; i < Queries; ++i) {
      float best = highest[i];
      for (int key = 0; key < count; ++key) best = scores[i][key] > best ? scores[i][key] : best;
      keep[i] = highest[i] == -INFINITY ? 0.0f : exponential(highest[i] - best);
      float sum = 0;
      for (int key = 0; key < count; ++key) {
        scores[i][key] = scores[i][key] == -INFINITY ? 0.0f : exponential(scores[i][key] - best);
        sum += scores[i][key];
      }
      total[i] = total[i] * keep[i] + sum;
      highest[i] = best;
    }
    accumulate<Queries>(scores, seen.values + first * a.width, a.width, count, keep, sums);
  }
  for (int i = 0; i < Queries; ++i) {
    share[i] = total[i] == 0 ? 0.0f : 1.0f / total[i];  // 0: a row that sees nothing
    for (int64_t at = 0; at < a.width; ++at) out[i * a.width + at] = to_bfloat16(sums[i * a.width + at] * share[i]);
  }
  if (seen.mass) add_mass<Queries>(a, queries, seen, highest, share);
}

// Where the keys of one row and head begin in the cache, in keys.
inline int64_t first_key(const SparityAttention& a, int64_t row, int64_t head) {
  return (row * a.kv_heads + head) * a.cache.capacity;
}

void append(const SparityAttention& a, const uint16_t* k, const uint16_t* v, int64_t row, int64_t token, int64_t head,
            int64_t at) {
  const int64_t from = (token * a.kv_heads + head) * a.width, to = (first_key(a, row, head) + at) * a.width;
  normed_and_rotated(a, k + from, a.key_norm, token, static_cast<uint16_t*>(a.cache.keys) + to);
  memcpy(static_cast<uint16_t*>(a.cache.values) + to, v + from, size_t(a.width) * 2);
}

void attend(const SparityAttention& a, const uint16_t* q, uint16_t* out, int64_t row, int64_t token, int64_t head,
            int64_t length) {
  const int64_t group = a.heads / a.kv_heads, width = a.width, first = first_key(a, row, head);
  const Keys seen = {static_cast<const uint16_t*>(a.cache.keys) + first * width,
                     static_cast<const uint16_t*>(a.cache.values) + first * width,
                     a.cache.mass ? a.cache.mass + first : nullptr,
                     length,
                     a.visible ? a.visible + row * a.visible_keys : nullptr,
                     a.visible_keys};
  const int64_t at = (token * a.heads + head * group) * width;
  int64_t i = 0;
  for (; i + 8 <= group; i += 8) attend_queries<8>(a, q + at + i * width, seen, token, out + at + i * width);
  for (; i + 4 <= group; i += 4) attend_queries<4>(a, q + at + i * width, seen, token, out + at + i * width);
  for (; i + 2 <= group; i += 2) attend_queries<2>(a, q + at + i * width, seen, token, out + at + i * width);
  for (; i < group; ++i) attend_queries<1>(a, q + at + i * width, seen, token, out + at + i * width);
}

constexpr sparity::DecodeKernels decode_kernels() { return {rms_norm, silu, gate, skip, append, attend}; }

}  // namespace
