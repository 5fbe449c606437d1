// What the kernels read of the inputs of a call, prepared once for all weights that share them.
#pragma once

#include <stdlib.h>

#include <algorithm>

#include "kernels.h"
#include "numbers.h"

namespace {

constexpr int kMostWeights = 64;  // of one call

// Scratch memory of the calling thread, kept between calls.
class Scratch {
 public:
  ~Scratch() { free(memory_); }
  char* at_least(size_t bytes) {
    if (bytes > size_) {
      free(memory_);
      size_ = 0;
      memory_ = static_cast<char*>(aligned_alloc(64, (bytes + 63) / 64 * 64));
      if (memory_) size_ = bytes;
    }
    return memory_;
  }

 private:
  char* memory_ = nullptr;
  size_t size_ = 0;
};

thread_local Scratch scratch;

bool finite(uint16_t bits) { return (bits & 0x7f80) != 0x7f80; }

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Which forms of an input some weight reads.
struct Forms {
  bool floats = false, ints = false, blocks = false, channel_floats = false, channel_ints = false;
  int32_t pairs = 0, fours = 0, channel_fours = 0;  // int4: the groups, added up, of dense weights, others and columns
  int64_t width = 0;  // of the widest weight, whose last blocks may reach beyond the columns

  void add(const SparityMatrix& weight) {
    width = std::max(width, weight.columns);
    if (weight.group) {
      const int32_t format = weight.format;
      (format == SPARITY_DENSE ? pairs : format == SPARITY_COLUMNS ? channel_fours : fours) |= weight.group;
      return;
    }
    if (weight.format == SPARITY_COLUMNS) {
      (weight.scales ? channel_ints : channel_floats) = true;
      return;
    }
    (weight.scales ? ints : floats) = true;
    if (weight.format != SPARITY_BLOCK) return;
    blocks = true;
    width = std::max(width, round_up(weight.columns, weight.block_width));
  }
};

// One input in these forms, in memory from `at` on; without memory, only the bytes it takes are counted.
class Prepared {
 public:
  sparity::Inputs floats, ints, channel_floats, channel_ints;

  Prepared(const sparity::Kernels& isa, const Forms& forms, int64_t tokens, int64_t columns, uintptr_t at)
      : isa_(isa), forms_(forms), tokens_(tokens), columns_(columns), begin_(at), at_(at) {
    stride_ = round_up(forms.width, sparity::kGroup) + 64;
    if (forms.floats) floats_ = take<char>(tokens * stride_ * isa.float_bytes);
    if (forms.ints) ints_ = take<char>(tokens * stride_ * isa.int_bytes);
    if (forms.blocks) not_finite_ = take<float>(tokens);
    if (forms.ints || forms.channel_ints) {
      bytes_ = take<int8_t>(tokens * columns);
      scales_ = take<float>(tokens);
    }
    fours_stride_ = round_up(columns, 128);
    for (int i = 0; i < 3; ++i) {
      if (forms.pairs & 32 << i) nibbles_[i][1] = take_fours(32 << i);
      if (forms.fours & 32 << i) nibbles_[i][0] = take_fours(32 << i);
      if (forms.channel_fours & 32 << i) channel_fours_[i] = take_channel_fours(32 << i);
    }
    if (forms.channel_floats || forms.channel_ints || forms.channel_fours) used_ = take<uint16_t>(columns);
    if (forms.channel_floats) {
      float_channels_ = take<int32_t>(columns);
      values_ = take<float>(tokens * stride_);
    }
    if (forms.channel_ints) {
      int_channels_ = take<int32_t>(columns);
      fours_ = take<int8_t>(tokens * stride_);
      sums_ = take<int32_t>(tokens);
    }
  }

  sparity::Inputs fours(const SparityMatrix& weight) const {
    if (weight.format == SPARITY_COLUMNS) return channel_fours_[weight.group / 64].made;
    const Fours& found = nibbles_[weight.group / 64][weight.format == SPARITY_DENSE];
    sparity::Inputs made = {found.x, fours_stride_, found.scales};
    made.group_stride = fours_stride_ / weight.group;
    made.shift_stride = shift_stride();
    made.shifts = found.shifts;
    return made;
  }

  uintptr_t bytes() const { return at_ - begin_; }

  void fill(const uint16_t* x) {
    for (int64_t token = 0; token < tokens_; ++token) {
      const uint16_t* values = x + token * columns_;
      if (forms_.floats) isa_.prepare_floats(values, columns_, stride_, floats_ + token * stride_ * isa_.float_bytes);
      if (forms_.blocks) not_finite_[token] = !std::all_of(values, values + columns_, finite);
      if (bytes_) isa_.quantize(values, columns_, bytes_ + token * columns_, scales_ + token);
      if (forms_.ints)
        isa_.prepare_ints(bytes_ + token * columns_, columns_, stride_, ints_ + token * stride_ * isa_.int_bytes);
    }
    floats = {floats_, stride_, not_finite_};
    ints = {ints_, stride_, scales_};
    for (int i = 0; i < 3; ++i)
      for (int paired = 0; paired < 2; ++paired)
        if (nibbles_[i][paired].x) fill_fours(x, nibbles_[i][paired], 32 << i, paired);
    if (forms_.channel_floats) fill_channel_floats(x);
    if (forms_.channel_ints) fill_channel_ints();
    for (int i = 0; i < 3; ++i)
      if (forms_.channel_fours & 32 << i) fill_channel_fours(x, channel_fours_[i], 32 << i);
  }

 private:
  template <class Value>
  Value* take(int64_t count) {
    const uintptr_t here = at_;
    at_ += uintptr_t( round_up(count * int64_t(sizeof(Value)), 64));
    return reinterpret_cast<Value*>(here);
  }

  struct Fours {
    int8_t* x;
    float* scales;
    int32_t* shifts;
  };

  int64_t shift_stride() const { return fours_stride_ / 4; }  // as many as there may be

  Fours take_fours(int64_t group) {
    int8_t* x = take<int8_t>(tokens_ * fours_stride_);
    float* scales = take<float>(tokens_ * fours_stride_ / group + sparity::kScaleLanes);
    return {x, scales, take<int32_t>(tokens_ * shift_stride())};
  }

  void fill_fours(const uint16_t* x, const Fours& to, int64_t group, bool paired) {
    for (int64_t token = 0; token < tokens_; ++token)
      isa_.prepare_fours(x + token * columns_, columns_, fours_stride_, group, paired, to.x + token * fours_stride_,
                         to.scales + token * fours_stride_ / group, to.shifts + token * shift_stride());
  }

  struct ChannelFours {
    int8_t *bytes, *used;  // of all channels, and of those in the list
    float* scales;
    int32_t *channels, *groups, *sums;
    sparity::Inputs made;
  };

  ChannelFours take_channel_fours(int64_t group) {
    const int64_t groups = columns_ / group;
    ChannelFours to = {};
    to.bytes = take<int8_t>(tokens_ * columns_);
    to.used = take<int8_t>(tokens_ * stride_);
    to.scales = take<float>(tokens_ * groups);
    to.channels = take<int32_t>(columns_);
    to.groups = take<int32_t>(groups + 1);
    to.sums = take<int32_t>(tokens_ * groups);
    return to;
  }

  void fill_channel_fours(const uint16_t* x, ChannelFours& to, int64_t group) {
    const int64_t groups = columns_ / group;
    for (int64_t token = 0; token < tokens_; ++token)
      for (int64_t i = 0; i < groups; ++i) {
        const int64_t at = token * columns_ + i * group;
        isa_.quantize(x + at, group, to.bytes + at, to.scales + token * groups + i);
        int32_t sum = 0;
        for (int64_t j = 0; j < group; ++j) sum += to.bytes[at + j];
        to.sums[token * groups + i] = sum;
      }
    const int64_t count = channels_of(to.bytes, int8_t(-1), to.channels);
    for (int64_t i = 0; i <= groups; ++i)
      to.groups[i] = int32_t(std::lower_bound(to.channels, to.channels + count, i * group) - to.channels);
    gather(to.bytes, to.channels, count, to.used);
    to.made = {to.used, stride_, to.scales, to.channels, count};
    to.made.group_stride = groups;
    to.made.shifts = to.sums;
    to.made.groups = to.groups;
  }

  // `values` [tokens, columns] of the channels in a list -> out [tokens, stride].
  template <class Value>
  void gather(const Value* values, const int32_t* channels, int64_t count, Value* out) {
    for (int64_t token = 0; token < tokens_; ++token) {
      const Value* from = values + token * columns_;
      Value* to = out + token * stride_;
      for (int64_t i = 0; i < count; ++i) to[i] = from[count == columns_ ? i : channels[i]];
    }
  }

  // The channels that some token uses: `bits` of x are not zero.
  template <class Value>
  int64_t channels_of(const Value* x, Value bits, int32_t* channels) {
    for (int64_t column = 0; column < columns_; ++column) used_[column] = uint16_t(x[column] & bits);
    for (int64_t token = 1; token < tokens_; ++token)
      for (int64_t column = 0; column < columns_; ++column)
        used_[column] |= uint16_t(x[token * columns_ + column] & bits);
    int64_t count = 0;
    for (int64_t column = 0; column < columns_; ++column) {  // without a jump
      channels[count] = int32_t(column);
      count += used_[column] != 0;
    }
    return count;
  }

  void fill_channel_floats(const uint16_t* x) {
    const int64_t count = channels_of(x, uint16_t(0x7fff), float_channels_);
    for (int64_t token = 0; token < tokens_; ++token) {
      float* values = values_ + token * stride_;
      const uint16_t* from = x + token * columns_;
      if (count == columns_)
        for (int64_t i = 0; i < count; ++i) values[i] = to_float(from[i]);
      else
        for (int64_t i = 0; i < count; ++i) values[i] = to_float(from[float_channels_[i]]);
    }
    channel_floats = {values_, stride_, nullptr, float_channels_, count};
  }

  void fill_channel_ints() {
    const int64_t count = channels_of(bytes_, int8_t(-1), int_channels_);
    gather(bytes_, int_channels_, count, fours_);
    for (int64_t token = 0; token < tokens_; ++token) {
      sums_[token] = 0;
      for (int64_t i = 0; i < count; ++i) sums_[token] += fours_[token * stride_ + i];
    }
    channel_ints = {fours_, stride_, scales_, int_channels_, count, sums_};
  }

  const sparity::Kernels& isa_;
  const Forms& forms_;
  int64_t tokens_, columns_, stride_, fours_stride_;
  ChannelFours channel_fours_[3] = {};  // by group 32, 64, 128, as the next
  Fours nibbles_[3][2] = {};  // by group 32, 64, 128; the second in the order of dense weights
  uintptr_t begin_, at_;
  char *floats_ = nullptr, *ints_ = nullptr;
  float *not_finite_ = nullptr, *scales_ = nullptr, *values_ = nullptr;
  int8_t *bytes_ = nullptr, *fours_ = nullptr;
  uint16_t* used_ = nullptr;
  int32_t *float_channels_ = nullptr, *int_channels_ = nullptr, *sums_ = nullptr;
};

#include "columns_parts.h"

// inputs[i]: xs[i] as weights[i] reads it; equal pointers are one input. False where there is no memory.
bool prepare(const sparity::Kernels& isa, const SparityMatrix* const* weights, int count, const uint16_t* const* xs,
             int64_t tokens, int threads, sparity::Inputs* inputs) {
  const int64_t columns = weights[0]->columns;
  Forms forms[kMostWeights];
  int first[kMostWeights];  // the first weight of the same input
  uintptr_t bytes = 0;
  for (int i = 0; i < count; ++i) {
    first[i] = int(std::find(xs, xs + i, xs[i]) - xs);
    forms[first[i]].add(*weights[i]);
  }
  for (int i = 0; i < count; ++i) {
    if (first[i] == i) bytes += Prepared(isa, forms[i], tokens, columns, 0).bytes();
    if (weights[i]->format == SPARITY_COLUMNS) bytes += prepare_parts(*weights[i], tokens, threads, 0, nullptr);
  }
  char* memory = scratch.at_least(size_t(bytes));
  if (!memory) return false;
  for (int i = 0; i < count; ++i) {
    if (first[i] != i) continue;
    Prepared found(isa, forms[i], tokens, columns, reinterpret_cast<uintptr_t>(memory));
    memory += found.bytes();
    found.fill(xs[i]);
    for (int j = i; j < count; ++j) {
      if (first[j] != i) continue;
      const bool ints = weights[j]->scales != nullptr;
      if (weights[j]->group) {
        inputs[j] = found.fours(*weights[j]);
      } else if (weights[j]->format != SPARITY_COLUMNS) {
        inputs[j] = ints ? found.ints : found.floats;
      } else {
        inputs[j] = ints ? found.channel_ints : found.channel_floats;
      }
      if (weights[j]->format == SPARITY_COLUMNS)
        memory += prepare_parts(*weights[j], tokens, threads, reinterpret_cast<uintptr_t>(memory), &inputs[j]);
    }
  }
  return true;
}

}  // namespace
