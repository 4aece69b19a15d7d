// The partition of a tensor into tiles, one per block: a function of its shape and element size alone, as in the Triton backend.
#pragma once
#include <algorithm>
#include <numeric>

#include "args.h"

namespace ctk::cuda {

struct Partition {
  bool plane = false;     // a tile has one channel, and one set of constants; otherwise constants are per column
  bool vector = false;    // a thread accesses 16 bytes at a time, not one value
  bool one_pass = false;  // a block, or a thread of it, sees a whole channel and writes its gradients
  int threads = 0;
  int64_t repeat = 1, blocks = 0;
  int64_t group = 0, row = 0, width = 0, cols_per = 0, rows = 0, rows_per = 0, row_cuts = 0, col_cuts = 0;

  int64_t slots() const { return plane ? row_cuts * col_cuts : row_cuts; }  // partial sums per channel, or per column
  int64_t columns(const View& v) const { return plane ? v.channels : width; }
};

// Channels with at least this many neighbouring values are planes.
inline constexpr int64_t kMinPlane = 256;
// Enough blocks to fill every GPU several times over; larger tensors get longer blocks. Fewer if each block leaves partial sums
// of its columns.
inline constexpr int64_t kBlocks = 4096, kSummingBlocks = 2048;
// Accesses per thread: at most; and at least, to amortise loading constants per column, and storing partial sums.
inline constexpr int64_t kMostSteps = 32, kLeastRows = 8, kLeastSummedRows = 16;
// Up to this many steps, one block processes a whole channel and needs no partial sums; tensors of up to kSmall values are
// partitioned so that it can.
inline constexpr int64_t kAlone = 32, kSmall = 1 << 16;
// Up to this many blocks do not fill a GPU: the time of one is the time of all.
inline constexpr int64_t kFewBlocks = 1024;

// values: per access of a thread, if that divides every length. sums: whether the kernel computes sums over channels.
inline Partition partition_with(const View& v, int64_t values, bool sums) {
  Partition p;
  p.group = v.outer * v.channels * v.inner;
  const bool one_launch = sums && v.outer <= kAlone && p.group * v.groups <= kSmall;
  const int64_t period = v.channels * v.inner;
  p.plane = v.channels == 1 || v.inner >= kMinPlane || period >= int64_t(1) << 30 || (one_launch && v.inner > 1);
  if (p.plane) {
    p.width = v.inner, p.row = period, p.rows = v.outer;
  } else {
    if (period < 32 * values && v.outer > 1 && !one_launch && !v.packed) {  // several periods side by side, a whole number of vectors
      const int64_t step = values / std::gcd(period, values);
      p.repeat = std::min(std::max(step, 64 * values / period / step * step), v.outer);
    }
    p.width = p.row = period * p.repeat;
    p.rows = ceil_div(v.outer, p.repeat);
  }
  p.vector = values > 1 && p.width % values == 0 && p.group % values == 0;
  // The size with the fewest idle threads, at a small cost per step; with the fewest steps if a few blocks process a channel each.
  const bool serial = sums && p.plane && v.channels * v.groups <= kFewBlocks && ceil_div(p.width, 32 * values) * p.rows <= kAlone;
  int64_t lanes = 0, least = 0;
  for (int threads = 32; threads <= kMaxThreads; threads *= 2) {
    const int64_t n = threads * values, cost = ceil_div(p.width, n) * (serial ? 1 : n + 2 * values);
    if (!lanes || cost < least) lanes = n, least = cost, p.threads = threads;
  }
  const int64_t strides = ceil_div(p.width, lanes);
  int64_t planes = 1;
  if (p.plane) {
    const int64_t total = strides * p.rows * v.channels * v.groups;
    int64_t steps = std::min(std::max(ceil_div(total, kBlocks), int64_t(1)), kMostSteps);
    if (sums && strides * p.rows <= kAlone) steps = kAlone;
    const int64_t cols = std::min(strides, steps);
    p.rows_per = std::min(p.rows, std::max(int64_t(1), steps / strides));
    p.cols_per = cols * lanes, p.col_cuts = ceil_div(strides, cols), planes = v.channels;
  } else {
    p.cols_per = lanes, p.col_cuts = strides;
    const int64_t even = ceil_div(p.rows * strides * v.groups, sums ? kSummingBlocks : kBlocks);
    p.rows_per = std::min({std::max(even, sums ? kLeastSummedRows : kLeastRows), 2 * kMostSteps, p.rows});
    if (sums && p.rows <= kAlone) p.rows_per = p.rows;
  }
  p.row_cuts = ceil_div(p.rows, p.rows_per);
  p.one_pass = p.plane ? p.row_cuts * p.col_cuts == 1 : p.row_cuts == 1 && p.repeat == 1 && v.inner == 1;
  p.blocks = v.groups * planes * p.row_cuts * p.col_cuts;
  return p;
}

// aligned: whether every tensor starts at a multiple of 16 bytes. Threads that write the gradients of their columns have one column
// each: that takes longer than moving their few values.
inline Partition partition_for(const View& v, int64_t itemsize, bool sums, bool aligned) {
  const Partition p = partition_with(v, 16 / itemsize, sums);
  const bool finishing = sums && p.one_pass && !p.plane;
  return p.vector && aligned && !finishing ? p : partition_with(v, 1, sums);
}

}  // namespace ctk::cuda
