// The partition of a tensor into tiles, each with its own partial sums, as a function of the shape alone; and of tiles into
// runs, one per kernel call.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "kernels.h"

namespace ctk::cpu {
namespace {

// Values per call of a block kernel: three or four float buffers of this size stay in L1.
constexpr int64_t kBlock = 1024;
// Values per call of a memory kernel.
constexpr int64_t kLongBlock = 4096;
// Values per tile. Determines how sums are grouped, so it must not depend on the machine or the number of threads.
constexpr int64_t kTile = 16384;
// Constants and sums of this many lanes stay in L1 during a strip of rows.
constexpr int64_t kLaneBlock = 256;
constexpr int64_t kStripRows = 16;
// Channels with at least this many neighbouring values are planes, with constants in registers; others are lanes.
constexpr int64_t kMinPlane = 16;
// The same for forward passes whose lanes differ in scale and shift alone: a lane costs them no more than a value of a plane.
constexpr int64_t kMinAffinePlane = 128;
// Partial sums per lane: at most kMaxCuts slots, each the sum, in double, of float sums over kFlushRows rows.
constexpr int64_t kMaxCuts = 32;
constexpr int64_t kFlushRows = 64;
static_assert(kFlushRows % kStripRows == 0, "sums are flushed between strips");
// Fewer values than this are not worth a second thread.
constexpr int64_t kParallelFrom = 32768;

struct Partition {
  Layout layout;
  // kPlane: `planes` runs of `length` values, each cut into `cuts` tiles.
  // kLanes: every group is rows of `length` lanes (`repeat` periods of channels * inner), `rows_per_tile` rows a tile.
  int64_t planes = 0, length = 0, cuts = 0;
  int64_t rows = 0, rows_per_tile = 0, repeat = 1, tail = 0;  // tail: lanes in the last row
  int64_t tiles = 0, tile_values = 0;
};

Partition partition_of(const View& v, int64_t min_plane = kMinPlane) {
  Partition p;
  const bool one_run = v.channels == 1 && !v.packed;  // of a whole group
  if (one_run || v.inner >= min_plane) {
    p.layout = kPlane;
    p.planes = v.groups * v.outer * v.channels;
    p.length = v.inner;
    if (one_run) p.planes = v.groups, p.length = v.outer * v.inner;
    p.cuts = std::max<int64_t>(1, ceil_div(p.length, kTile));
    p.tiles = p.planes * p.cuts;
    p.tile_values = std::min(p.length, kTile);
    return p;
  }
  p.layout = kLanes;
  const int64_t period = v.channels * v.inner;
  p.repeat = v.packed ? 1 : std::max<int64_t>(1, std::min(v.outer, 256 / period));
  p.length = period * p.repeat;
  p.rows = ceil_div(v.outer, p.repeat);
  p.tail = (v.outer - (p.rows - 1) * p.repeat) * period;
  p.rows_per_tile = std::max(ceil_div(p.rows, kMaxCuts), ceil_div(2 * kTile, p.length));
  p.cuts = ceil_div(p.rows, p.rows_per_tile);
  p.tiles = v.groups * p.cuts;
  p.tile_values = p.length * std::min(p.rows, p.rows_per_tile);
  return p;
}

template <class F>
void for_tiles(const Partition& p, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kParallelFrom / std::max<int64_t>(1, p.tile_values));
  if (p.tiles <= grain) f(0, p.tiles);
  else torch::stable::parallel_for(0, p.tiles, grain, f);
}

// Channels whose parameters, constants and sums are on the stack at once; it may be as small as 16 KiB (OMP_STACKSIZE).
constexpr int64_t kChannelBlock = 16;

// Calls f(begin, end) for blocks of channels, on several threads if there are many.
template <class Op, class F>
void for_channels(int64_t channels, const F& f) {
  const auto blocks = [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c += kChannelBlock) f(c, std::min(end, c + kChannelBlock));
  };
  if (channels <= Op::kParallelChannels) blocks(0, channels);
  else torch::stable::parallel_for(0, channels, Op::kParallelChannels, blocks);
}

// The values of n parameters for a block of channels, in double.
template <int n>
struct ParamBlock {
  double values[n][kChannelBlock];

  ParamBlock(const Param* params, int64_t channels, int64_t g, int64_t begin, int64_t end) {
    for (int i = 0; i < n; ++i) {
      const Param& p = params[i];
      double* to = values[i];
      if (!p.data) std::fill_n(to, end - begin, p.fallback);
      else if (p.is_double) read(p, static_cast<const double*>(p.data), channels, g, begin, end, to);
      else read(p, static_cast<const float*>(p.data), channels, g, begin, end, to);
    }
  }
  // Those of channel j of the block.
  void get(int64_t j, double (&p)[n]) const {
    for (int i = 0; i < n; ++i) p[i] = values[i][j];
  }

 private:
  template <class From>
  static void read(const Param& p, const From* from, int64_t channels, int64_t g, int64_t begin, int64_t end, double* to) {
    from += p.index(g, 0, channels);
    if (p.count == channels) {
      std::copy(from + begin, from + end, to);
      return;
    }
    const int64_t each = channels / p.count;
    for (int64_t c = begin, i = begin / each; c < end; ++i) {
      const int64_t next = std::min(end, (i + 1) * each);
      std::fill_n(to + (c - begin), next - c, static_cast<double>(from[i]));
      c = next;
    }
  }
};

// Values per channel: kPlane [group][channel][value]; kLanes [group][value][lane].
template <class T>
struct Table {
  std::vector<T> data;
  int64_t count = 0, per_group = 0;  // values per channel, and of all channels
  int64_t groups = 1;                // group g has the values of group g % groups
  bool uniform = false;              // one set, [value], for all channels and groups

  // Of the channel, or the first lane, of a run.
  const T* of(Layout layout, int64_t g, int64_t channel_or_lane) const {
    if (uniform) return data.data();
    return data.data() + g % groups * per_group + channel_or_lane * (layout == kPlane ? count : 1);
  }

  // compute(g, begin, end, values) computes `values[i][j]` for channels [begin, end).
  template <class Op, int n, class F>
  void fill(const View& v, const Partition& p, const F& compute) {
    count = n;
    per_group = uniform ? n : n * (p.layout == kPlane ? v.channels : p.length);
    data.resize(groups * per_group);
    const auto block = [&](int64_t g, int64_t begin, int64_t end) {
      T values[n][kChannelBlock];
      compute(g, begin, end, values);
      // Canonical NaNs: vector code rounds to 16 bits without checking for NaN, and 0x7fffffff, a GPU's NaN, would become -0.
      for (auto& row : values)
        for (int64_t j = 0; j < end - begin; ++j)
          if (row[j] != row[j]) row[j] = std::numeric_limits<T>::quiet_NaN();
      T* out = data.data() + g * per_group;
      for (int i = 0; i < n; ++i) {
        T* lane = out + i * p.length + begin * v.inner;
        if (uniform || p.layout == kPlane)
          for (int64_t j = 0; j < end - begin; ++j) out[(begin + j) * n + i] = values[i][j];
        else if (v.inner == 1) std::copy_n(values[i], end - begin, lane);
        else
          for (int64_t j = 0; j < end - begin; ++j) std::fill_n(lane + j * v.inner, v.inner, values[i][j]);
      }
    };
    if (uniform) return block(0, 0, 1);
    for (int64_t g = 0; g < groups; ++g) {
      for_channels<Op>(v.channels, [&](int64_t begin, int64_t end) { block(g, begin, end); });
      if (p.layout == kPlane) continue;
      for (int i = 0; i < n; ++i) {
        T* row = data.data() + g * per_group + i * p.length;
        for (int64_t r = 1; r < p.repeat; ++r) std::copy_n(row, v.channels * v.inner, row + r * v.channels * v.inner);
      }
    }
  }
};

// What a call computes from its parameters: the op's constants, and the prologue's (scale, shift).
template <class T>
struct Constants {
  Table<T> op, prologue;

  Layout layout(const Partition& p) const { return p.layout == kLanes && op.uniform ? kAffineLanes : p.layout; }
};

// Whether all channels have the same constants.
template <class Op>
bool is_uniform(const Operands& in) {
  return std::all_of(in.params, in.params + Op::kParams, [](const Param& p) { return p.groups == 1 && p.count == 1; });
}

// uniform: whether one set of constants serves all channels.
template <class Op, class T>
Constants<T> precompute(const typename Op::Attributes& attributes, const Operands& in, const Partition& partition,
                        bool has_prologue, bool uniform) {
  const View& v = in.view;
  const auto groups = [&](int first, int last) {
    int64_t most = 1;
    for (int i = first; i < last; ++i) most = std::max(most, in.params[i].groups);
    return most;
  };
  Constants<T> k;
  k.op.groups = groups(0, Op::kParams);
  k.op.uniform = uniform;
  k.op.template fill<Op, Op::kConstants>(v, partition, [&](int64_t g, int64_t begin, int64_t end, auto& values) {
    const ParamBlock<Op::kParams> params(in.params, v.channels, g, begin, end);
    double p[Op::kParams];
    T constants[Op::kConstants];
    for (int64_t j = 0; j < end - begin; ++j) {
      params.get(j, p);
      Op::precompute(attributes, p, constants);
      for (int i = 0; i < Op::kConstants; ++i) values[i][j] = constants[i];
    }
  });
  if constexpr (Op::kPrologue) {
    if (!has_prologue) return k;
    k.prologue.groups = groups(Op::kParams, Op::kParams + 2);
    k.prologue.template fill<Op, 2>(v, partition, [&](int64_t g, int64_t begin, int64_t end, auto& values) {
      const ParamBlock<2> params(in.params + Op::kParams, v.channels, g, begin, end);
      for (int i = 0; i < 2; ++i) std::copy_n(params.values[i], end - begin, values[i]);
    });
  }
  return k;
}

// The largest run: `values` with one set of constants; `rows` rows of `lanes` lanes, in strips of `strip` rows.
struct RunSize {
  int64_t values, rows, lanes, strip;
};

// staged: values pass through buffers. Memory-bound ops gain more from long runs through memory than from keeping their few
// constants in L1.
RunSize run_size(bool staged, bool memory_bound) {
  if (staged) return {kBlock, 1, kLaneBlock, kStripRows};
  return {kLongBlock, kRunRows, memory_bound ? kLongBlock : kLaneBlock, kRunRows};
}

// Calls f(run, tile) for the runs of tiles [begin, end).
template <class T, class F>
void for_runs(const Partition& p, const RunSize& size, const View& v, const Constants<T>& k, int64_t begin, int64_t end,
              const F& f) {
  // In a packed tensor, rows of x and of its factor alternate.
  const int64_t period = v.channels * v.inner;
  const auto in = [&](int64_t offset) { return v.packed ? offset + offset / period * period : offset; };
  for (int64_t tile = begin; tile < end; ++tile) {
    Run<T> run;
    run.layout = k.layout(p);
    const auto set_constants = [&](int64_t g, int64_t channel_or_lane) {
      run.constants = k.op.of(p.layout, g, channel_or_lane);
      run.scale = k.prologue.count ? k.prologue.of(p.layout, g, channel_or_lane) : nullptr;
      run.shift = run.scale ? run.scale + (p.layout == kPlane ? 1 : p.length) : nullptr;
    };
    run.row = p.length;
    run.in_row = v.packed ? 2 * p.length : p.length;
    if (p.layout == kPlane) {
      const int64_t plane = tile / p.cuts, from = (tile % p.cuts) * kTile, to = std::min(p.length, from + kTile);
      const int64_t g = plane / (p.planes / v.groups), c = plane % v.channels;
      set_constants(g, c);
      for (int64_t i = from; i < to; i += size.values) {
        run.offset = plane * p.length + i;
        run.in = in(run.offset);
        run.n = std::min(size.values, to - i);
        f(run, tile);
      }
    } else {
      const int64_t g = tile / p.cuts, cut = tile % p.cuts;
      const int64_t last = std::min(p.rows, (cut + 1) * p.rows_per_tile);
      run.stride = p.length;
      for (int64_t strip = cut * p.rows_per_tile; strip < last; strip += size.strip) {
        for (int64_t column = 0; column < p.length; column += size.lanes) {
          run.lane = column;
          set_constants(g, column);
          const int64_t end_row = std::min(last, strip + size.strip);
          for (int64_t row = strip; row < end_row; row += run.rows) {
            const bool short_row = row == p.rows - 1;
            run.rows = short_row ? 1 : std::min({size.rows, end_row - row, p.rows - 1 - row});
            run.offset = g * v.outer * v.channels * v.inner + row * p.length + column;
            run.in = in(run.offset);
            run.n = std::min(size.lanes, (short_row ? p.tail : p.length) - column);
            if (run.n > 0) f(run, tile);
          }
        }
      }
    }
  }
}

// A thread's sums per lane, flushed to their tile's slot, in double, before float loses digits.
template <class T>
class LaneSums {
 public:
  LaneSums(int sums, int64_t length, double* slots) : size_(sums * length), slots_(slots), lanes_(slots ? size_ : 0) {}
  ~LaneSums() { flush(); }

  // Call before adding `rows` more rows of `tile`.
  void expect(int64_t tile, int64_t rows) {
    if (tile != tile_ || rows_ == kFlushRows) {
      flush();
      first_ = first_ || tile != tile_;
      tile_ = tile, rows_ = 0;
    }
    rows_ += rows;
  }
  T* data() { return lanes_.data(); }

 private:
  void flush() {
    if (tile_ < 0) return;
    double* slot = slots_ + tile_ * size_;
    for (int64_t i = 0; i < size_; ++i) slot[i] = (first_ ? 0.0 : slot[i]) + lanes_[i];
    std::fill(lanes_.begin(), lanes_.end(), T(0));
    first_ = false;
  }
  int64_t size_;
  double* slots_;
  std::vector<T> lanes_;
  int64_t tile_ = -1, rows_ = 0;
  bool first_ = true;  // the tile's slot has not been written
};

}  // namespace
}  // namespace ctk::cpu
