// What the host hands to the kernels: plain structs, the only argument of each kernel. tests/helpers/cuda_recorder.py reads them.
#pragma once
#include "../driver.h"

namespace ctk::cuda {

// `rows` x `count` values: channel c of group g reads value (g % rows) * count + c / run.
struct ParamRef {
  const void* data;  // null: `fallback` everywhere
  double fallback;
  uint32_t rows, count, run;
  bool is_double;
};

// A parameter gradient as kernels write it: a value per (group, channel). Null: not wanted.
struct GradRef {
  void* data;
  bool is_double;
};

// The partition of a tensor. Lengths are in values. A block's tile is `rows_per` rows of a row's columns
// [col_cut * cols_per, ...): in a plane, of one channel's `width` neighbouring values; in lanes, of the whole periods
// (channels * inner, `width` values together) that make up a row.
struct Tiling {
  int64_t group, row, width, cols_per;
  uint32_t rows, rows_per, row_cuts, col_cuts, channels, inner;
  bool packed;  // x and its factor, and so their gradients: rows of each alternate
};

template <class Op>
struct Channelwise {
  Tiling tiling;
  const void *x, *residual, *factor, *dy;
  void *y, *dx, *dresidual, *dfactor;
  void* partial;        // [group, slot, sum, column]; null: blocks finish their sums
  const float* table;   // made by the op's precompute kernel; null: by each block
  uint32_t wanted;      // mask of the sums to make
  uint32_t table_rows;  // groups that `table` tells apart
  ParamRef params[kParamsOf<Op>];
  GradRef grads[kParamsOf<Op>];
  typename Op::Attributes attributes;
};

// parameters -> to[value][row][channel], kTable values.
template <class Op>
struct Precompute {
  float* to;
  uint32_t rows, channels;
  ParamRef params[kParamsOf<Op>];
  typename Op::Attributes attributes;
};

// partial[group, slot, sum, repeat, channel, inner] -> grads[group, channel]
template <class Op>
struct ReducePartials {
  const void* partial;
  int64_t columns;
  uint32_t channels, inner, repeat, slots, wanted;
  ParamRef params[kParamsOf<Op>];
  GradRef grads[kParamsOf<Op>];
  typename Op::Attributes attributes;
};

// Gradients of parameters that channels or groups share: values per (group, channel), added up. Block b makes the value
// b - first[i] of the last item i with first[i] <= b.
struct ReduceShared {
  uint32_t groups, channels, items;
  struct Item {
    const double* from;
    void* to;
    uint32_t rows, count, run, first;
    bool is_double;
  } item[kMaxParams];
};

inline constexpr int kMaxThreads = 128;  // of channelwise kernels
inline constexpr int kReduceThreads = 512;
inline constexpr int kSharedThreads = 128;
inline constexpr int kGateThreads = 128;
inline constexpr int kTableThreads = 128;

}  // namespace ctk::cuda
