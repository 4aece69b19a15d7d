// What the host hands to the kernels: plain structs, the only argument of each kernel.
#pragma once
#include "../hard_concrete.h"
#include "../params.h"

namespace ctk::cuda {

// `rows` x `count` values: channel c of group g reads value (g % rows) * count + c / run.
struct ParamRef {
  const void* data;  // null: absent, `fallback` everywhere
  double fallback;
  uint32_t rows, count, run;
  bool is_double;
};

// Sums over a channel, in the order of params.h: the op's own five at most, then those of the prologue's scale and shift.
inline constexpr int kSumSlots = kCtuSums;
inline constexpr uint32_t kOwnSums = (1u << kCtuScaleSum) - 1;

// How a tensor is cut into blocks. Lengths are in values. A block's tile is `rows_per` rows of a row's columns
// [col_cut * cols_per, ...): in a plane, of one channel's `width` neighbouring values; else of the whole periods
// (channels * inner, `width` values together) that make up a row.
struct Tiling {
  int64_t group, row, width, cols_per;
  uint32_t rows, rows_per, row_cuts, col_cuts, channels, inner;
};

// A parameter gradient as kernels write it: a value per (group, channel). Null: not wanted.
struct GradRef {
  void* data;
  bool is_double;
};

struct Channelwise {
  Tiling tiling;
  const void *x, *residual, *dy;
  void *y, *dx, *dresidual;
  void* partial;  // [group, slot, sum, column]; null: sums are finished on the spot
  const float* knobs;  // what `knobs` made, of all channels; null where knobs are no logits
  uint32_t wanted;     // mask of the sums to make
  uint32_t knob_rows;  // groups that `knobs` tells apart
  CtuStatic ctu;
  ParamRef params[kMaxParams];
  GradRef grads[kMaxParams];
};

// beta and coeff -> to[knob][row][channel], the fields of FloatKnobs: sigmoids in double precision are not for every block.
struct Knobs {
  float* to;
  uint32_t rows, channels;
  CtuStatic ctu;
  ParamRef beta, coeff;
};

// partial[group, slot, sum, repeat, channel, inner] -> grads[group, channel]
struct Finish {
  const void* partial;
  int64_t columns;
  uint32_t channels, inner, repeat, slots, wanted;
  CtuStatic ctu;
  ParamRef params[kMaxParams];
  GradRef grads[kMaxParams];
};

// Gradients of parameters that channels or groups share: values per (group, channel), added up. Block b makes the value
// b - first[i] of the last item i with first[i] <= b.
struct Collect {
  uint32_t groups, channels, items;
  struct Item {
    const double* from;
    void* to;
    uint32_t rows, count, run, first;
    bool is_double;
  } item[kMaxParams];
};

struct Gates {
  const void *log_alpha, *noise, *dy;  // noise: null where nothing is sampled; `seeded`: the seed of it
  void *value, *d_log_alpha, *d_noise;
  int64_t n;
  Gate gate;
  bool seeded;
};

inline constexpr int kMaxThreads = 128;    // channelwise kernels
inline constexpr int kFinishThreads = 512;
inline constexpr int kKnobFields = 6;  // of FloatKnobs
inline constexpr int kCollectThreads = 128;
inline constexpr int kGateThreads = 128;
inline constexpr int kKnobThreads = 128;

}  // namespace ctk::cuda
