// Weights of four bits, two in a byte, with a scale for each group of a row. Inputs are int8, in groups of the same columns
// that have a scale of their own, so sums within a group are exact whole numbers; each group's is scaled and added in
// float32. `Isa::Fours` has the vectors:
//   Codes  the weights of a step as they are stored, one in a byte;    Sum    float32 partial sums
//   ready  makes them unsigned: code - zero + 8, with zero points + 16
//   Total  int32 partial sums, which start with what takes the 8 or 16 back
// Those of bitmask are here, dense ones and two of four in rows.h.
// Included by gemv.h inside its namespace.

constexpr int64_t kPiece = 4096;  // columns whose scales are prepared at a time, and stay in the first cache
constexpr int64_t kMostGroup = 128;
constexpr int64_t kOctet = 8;  // columns whose even ones come before the odd ones, in inputs of dense weights
constexpr int64_t kCodeSums = 16;  // of the sums of Codes

inline void quantize(const uint16_t* x, int64_t columns, int8_t* out, float* scale);  // of gemv.h

inline float half_to_float(uint16_t bits) {  // of a number that is finite
  const uint32_t word = uint32_t(bits & 0x7fff) << 13 | uint32_t(bits & 0x8000) << 16;
  float value;
  memcpy(&value, &word, 4);
  return value * 0x1p112f;
}

// One scale of a weight.
inline float scale_of(const SparityMatrix& weight, int64_t at) {
  if (weight.scale_type == SPARITY_FLOAT32) return static_cast<const float*>(weight.group_scales)[at];
  const uint16_t half = static_cast<const uint16_t*>(weight.group_scales)[at];
  return weight.scale_type == SPARITY_FLOAT16 ? half_to_float(half) : to_float(half);
}

// Scales [first, first + count) of a weight as float32; `out` has room for `kScaleLanes` more, which may be written to.
inline void load_scales(const SparityMatrix& weight, int64_t first, int64_t count, float* out) {
  constexpr int64_t kLanes = sparity::kScaleLanes;
  const auto* halves = static_cast<const uint16_t*>(weight.group_scales) + first;
  const int64_t groups = weight.columns >> __builtin_ctz(uint32_t(weight.group));  // a division takes as long as a line
  const int64_t there = weight.rows * groups - first, whole = (count + kLanes - 1) / kLanes * kLanes;
  if (weight.scale_type == SPARITY_FLOAT32) {
    memcpy(out, static_cast<const float*>(weight.group_scales) + first, size_t(count) * sizeof(float));
  } else if (weight.scale_type == SPARITY_FLOAT16) {
    for (int64_t i = 0; i < count; ++i) out[i] = half_to_float(halves[i]);
  } else if (whole <= there) {
    for (int64_t at = 0; at < whole; at += kLanes)
      for (int64_t i = 0; i < kLanes; ++i) out[at + i] = to_float(halves[at + i]);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = to_float(halves[i]);
  }
}

// multiply(count, token) for four tokens at a time, then for two and for one.
template <class Multiply>
inline void in_batches(int64_t tokens, const Multiply& multiply) {
  int64_t token = 0;
  for (; token + 4 <= tokens; token += 4) multiply(std::integral_constant<int, 4>(), token);
  if (tokens - token >= 2) {
    multiply(std::integral_constant<int, 2>(), token);
    token += 2;
  }
  if (tokens - token == 1) multiply(std::integral_constant<int, 1>(), token);
}

#include "nibbles_sources.h"

// Of a tile's rows the scales, times those of the inputs. They are made before the first row is multiplied: what was only
// just written is slow to read in wider pieces.
template <int Tokens, int Tile, int Group>
struct FoursScales {
  float at[Tile][Tokens][kPiece / Group + sparity::kScaleLanes];

  // Of the rows from `first` to `last` of a tile that begins at `row`, for the columns from `piece` to `end`.
  inline void load(const SparityMatrix& weight, const Inputs& in, int64_t token, int64_t row, int first, int last,
                   int64_t piece, int64_t end) {
    const int64_t groups = weight.columns / Group, count = (end - piece) / Group;
    const bool together = count == groups && row + last <= weight.rows;  // the rows' scales lie one after another
    float own[Tile * (kPiece / Group) + kLanes];
    if (together) load_scales(weight, (row + first) * groups, (last - first) * groups, own);
    for (int r = first; r < last; ++r) {
      const float* from = own + (together ? (r - first) * groups : 0);
      const int64_t own_row = row + r < weight.rows ? row + r : weight.rows - 1;
      if (!together) load_scales(weight, own_row * groups + piece / Group, count, own);
      for (int t = 0; t < Tokens; ++t) {
        const float* theirs = in.scales + (token + t) * in.group_stride + piece / Group;
        for (int64_t group = 0; group < count; group += kLanes)  // whole vectors, also beyond the last group
          for (int64_t i = 0; i < kLanes; ++i) at[r][t][group + i] = from[group + i] * theirs[group + i];
        for (int i = 0; i < kMostGroup / 32; ++i) at[r][t][count + i] = 0;  // which a last step may read
      }
    }
  }

 private:
  static constexpr int64_t kLanes = sparity::kScaleLanes;
};

// ---- `Rows` rows, from `first` on in a tile that begins at `row`, times `Tokens` inputs: the order of a sum's terms depends
// on none of these

template <class Isa, int Rows, bool Zeros, template <class, int, int> class Of, int Tokens, int Tile, int Group>
inline void fours_rows(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t token, int64_t row,
                       int first, FoursScales<Tokens, Tile, Group>& scales) {
  using Fours = typename Isa::Fours;
  constexpr int64_t kStep = Of<Isa, Rows, 1>::kStep;
  constexpr int kParts = Group > kStep ? int(Group / kStep) : 1;  // steps in a group
  constexpr int kGroups = Group < kStep ? int(kStep / Group) : 1;  // groups in a step
  constexpr int64_t kUnit = kStep * kParts, kSpare = kMostGroup / 32;
  Of<Isa, Rows, kParts> source(weight, row + first);
  const auto* x = static_cast<const int8_t*>(in.x) + token * in.stride;
  const int32_t* shifts = in.shifts + token * in.shift_stride;
  typename Fours::Sum sums[Rows][Tokens] = {};
  const int64_t groups = weight.columns / Group;
  for (int64_t piece = 0; piece < weight.columns; piece += kPiece) {
    const int64_t end = piece + kPiece < weight.columns ? piece + kPiece : weight.columns;
    if (weight.columns > kPiece) scales.load(weight, in, token, row, first, first + Rows, piece, end);
    const uint8_t* zeros[Rows];
    uint8_t copies[Zeros ? Rows : 1][Zeros ? kPiece / Group + kSpare : 1];
    for (int r = 0; Zeros && r < Rows; ++r) {
      const int64_t own = row + first + r < weight.rows ? row + first + r : weight.rows - 1;
      const int64_t at = own * groups + piece / Group, count = (end - piece) / Group;
      zeros[r] = weight.zeros + at;
      if (at + count + kSpare <= weight.rows * groups) continue;
      memset(copies[r], 0, sizeof copies[r]);  // a last step reaches beyond the matrix
      zeros[r] = static_cast<const uint8_t*>(memcpy(copies[r], weight.zeros + at, size_t(count)));
    }
    const auto add = [&](auto room, int64_t column) __attribute__((always_inline)) {
      const int64_t group = (column - piece) / Group;
      typename Fours::Total totals[Rows][Tokens];
      const int32_t* from = shifts + column / kUnit * kCodeSums;
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t)
          totals[r][t] = Fours::template start<Zeros>(from + t * in.shift_stride);
#pragma GCC unroll 2
      for (int part = 0; part < kParts; ++part) {
        source.begin(column + part * kStep);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
          const auto codes = Fours::template ready<Zeros, kGroups>(
              source.template codes<room>(column + part * kStep, r), Zeros ? zeros[r] + group : nullptr);
#pragma GCC unroll 4
          for (int t = 0; t < Tokens; ++t)
            totals[r][t] = Fours::add(totals[r][t], codes, x + t * in.stride + column + part * kStep);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t)
          sums[r][t] = Fours::template finish<kGroups>(sums[r][t], totals[r][t], scales.at[first + r][t] + group);
    };
    int64_t column = piece;
    for (; column < end && source.has_room(column); column += kUnit) add(std::true_type(), column);
    for (; column < end; column += kUnit) add(std::false_type(), column);
  }
  for (int r = 0; r < Rows; ++r)
    for (int t = 0; t < Tokens; ++t) store_inside(weight, out, token + t, row + first + r, Fours::sum(sums[r][t]));
}

// The rows of a tile, `Rows` at a time.
template <class Isa, int Rows, bool Zeros, template <class, int, int> class Of, int Tokens, int Group>
inline void fours_group(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t token, int64_t row) {
  FoursScales<Tokens, Rows, Group> scales;
  if (weight.columns <= kPiece) scales.load(weight, in, token, row, 0, Rows, 0, weight.columns);
  fours_rows<Isa, Rows, Zeros, Of>(weight, in, out, token, row, 0, scales);
}

template <class Isa, int Rows, bool Zeros, template <class, int, int> class Of, int Tokens>
inline void fours_groups(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t token, int64_t row) {
  if (weight.group == 32) return fours_group<Isa, Rows, Zeros, Of, Tokens, 32>(weight, in, out, token, row);
  if (weight.group == 64) return fours_group<Isa, Rows, Zeros, Of, Tokens, 64>(weight, in, out, token, row);
  fours_group<Isa, Rows, Zeros, Of, Tokens, 128>(weight, in, out, token, row);
}

template <class Isa, template <class, int, int> class Of>
inline void fours_all_tokens(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t tokens,
                             int64_t row) {
  const auto multiply = [&](auto count, int64_t token) {
    if (weight.zeros)
      fours_groups<Isa, kTileRows, true, Of, count>(weight, in, out, token, row);
    else
      fours_groups<Isa, kTileRows, false, Of, count>(weight, in, out, token, row);
  };
  in_batches(tokens, multiply);
}

// Where the scale and the zero point of a row's group are.
inline int64_t side_of(const SparityMatrix& weight, int64_t row, int64_t group) {
  const int64_t groups = weight.columns / weight.group;
  if (!sparity::side_by_side(weight)) return row * groups + group;
  return (row / kSideBySide * groups + group) * kSideBySide + row % kSideBySide;
}

#include "rows.h"

template <class Isa>
void fours(const SparityMatrix& weight, const Inputs& in, const Outputs& out, int64_t tokens, int64_t begin,
           int64_t end) {
  if (weight.format == SPARITY_DENSE) return rows_side_by_side<Isa, DenseTile>(weight, in, out, tokens, begin, end);
  if (weight.format == SPARITY_TWO_OF_FOUR) return rows_side_by_side<Isa, PairedTile>(weight, in, out, tokens, begin, end);
  for (int64_t row = begin * kTileRows; row < end * kTileRows && row < weight.rows; row += kTileRows)
    fours_all_tokens<Isa, MaskedFours>(weight, in, out, tokens, row);
}

// ---- inputs

// One token as int8 in groups, in the order of columns or (paired) in that of dense weights; and for each int32 sum (of
// dense weights one in a group) minus 8 times the sum of its inputs.
template <class Isa>
void prepare_fours(const uint16_t* x, int64_t columns, int64_t stride, int64_t group, bool paired, int8_t* out,
                   float* scales, int32_t* shifts) {
  const int64_t step = paired ? group : kGroup, lanes = paired ? 1 : kCodeSums, lane = step / lanes;
  const int64_t unit = group > step ? group : step;
  for (int64_t column = 0; column < stride; column += kMostGroup) {
    int8_t bytes[kMostGroup] = {};
    for (int64_t at = 0; at < kMostGroup && column + at < columns; at += group)
      quantize(x + column + at, group, bytes + at, scales + (column + at) / group);
    if (paired) {
      for (int64_t i = 0; i < kMostGroup; ++i) out[column + i] = bytes[i / kOctet * kOctet + i % 4 * 2 + i % kOctet / 4];
    } else {
      memcpy(out + column, bytes, sizeof bytes);
    }
    for (int64_t from = 0; from < kMostGroup; from += unit) {
      int32_t* to = shifts + (column + from) / unit * lanes;
      for (int64_t i = 0; i < lanes; ++i) {
        int32_t sum = 0;
        for (int64_t part = 0; part < unit; part += step)
          for (int64_t j = 0; j < lane; ++j) sum += bytes[from + part + i * lane + j];
        to[i] = -8 * sum;
      }
    }
  }
}

#include "nibbles_unpack.h"
