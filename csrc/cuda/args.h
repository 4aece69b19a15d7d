// Arguments of the kernels: one plain struct each. tests/helpers/cuda_recorder.py reads them.
#pragma once
#include "../driver.h"

namespace ctk::cuda {

// `rows` x `count` values: channel c of group g reads value (g % rows) * count + c / run.
struct ParamRef {
  const void* data;  // null: `fallback` for every channel
  double fallback;
  uint32_t rows, count, run;
  bool is_double;
};

// A parameter gradient as kernels write it: a value per (group, channel). Null: not requested.
struct GradRef {
  void* data;
  bool is_double;
};

// The partition of a tensor, in values. A block's tile is `rows_per` rows of the columns from col_cut * cols_per on. A row has
// `width` values: in a plane, the neighbouring values of one channel; in lanes, whole periods (channels * inner).
struct Tiling {
  int64_t group, row, width, cols_per;
  uint32_t rows, rows_per, row_cuts, col_cuts, channels, inner;
  bool packed;  // rows of x and of its factor alternate, and so do those of their gradients
};

template <class Op>
struct Channelwise {
  Tiling tiling;
  const void *x, *residual, *factor, *dy;
  void *y, *dx, *dresidual, *dfactor;
  void* partial;        // partial sums [group, slot, sum, column]; null: blocks write the gradients
  const float* table;   // from the op's precompute kernel; null: each block computes it
  uint32_t wanted;      // mask of the sums to compute
  uint32_t table_rows;  // 1, or the number of groups
  ParamRef params[kParamsOf<Op>];
  GradRef grads[kParamsOf<Op>];
  typename Op::Attributes attributes;
};

// parameters -> to[value][row][channel], kTable values each.
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

// Gradients of parameters that channels or groups share: sums of values per (group, channel). Block b computes value b - first
// of the last item with first <= b.
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
