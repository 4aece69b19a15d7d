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

Partition partition_of(const View& v) {
  Partition p;
  const bool one_run = v.channels == 1 && !v.packed;  // of a whole group
  if (one_run || v.inner >= kMinPlane) {
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

// The parameters of a block of channels, in double.
template <class Op>
struct ParamBlock {
  double values[kParamsOf<Op>][kChannelBlock];

  ParamBlock(const Operands& in, int64_t g, int64_t begin, int64_t end) {
    for (int i = 0; i < kParamsOf<Op>; ++i) {
      const Param& p = in.params[i];
      double* to = values[i];
      if (!p.data) std::fill_n(to, end - begin, p.fallback);
      else if (p.is_double) read(p, static_cast<const double*>(p.data), g, in.view.channels, begin, end, to);
      else read(p, static_cast<const float*>(p.data), g, in.view.channels, begin, end, to);
    }
  }
  // The op's own parameters of channel j of the block.
  void get(int64_t j, double (&p)[Op::kParams]) const {
    for (int i = 0; i < Op::kParams; ++i) p[i] = values[i][j];
  }

 private:
  template <class From>
  static void read(const Param& p, const From* from, int64_t g, int64_t channels, int64_t begin, int64_t end, double* to) {
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

// Constants of every channel: kPlane [group][channel][constant]; kLanes [group][constant][lane]. The prologue's scale and
// shift come last.
template <class T>
struct Constants {
  std::vector<T> data;
  int count = 0;
  int64_t per_group = 0;
  int64_t groups = 1;  // sets of constants; group g uses set g % groups
};

template <class Op, class T>
Constants<T> precompute(const typename Op::Attributes& attributes, const Operands& in, const Partition& partition) {
  constexpr int count = Op::kConstants + (Op::kPrologue ? 2 : 0);
  const View& v = in.view;
  Constants<T> k;
  k.count = count;
  for (int i = 0; i < kParamsOf<Op>; ++i) k.groups = std::max(k.groups, in.params[i].groups);
  // Channels that differ only in scale and shift share the op's constants.
  const bool shared = std::all_of(in.params, in.params + Op::kParams, [](const Param& p) { return p.count == 1; });
  k.per_group = count * (partition.layout == kPlane ? v.channels : partition.length);
  k.data.resize(k.groups * k.per_group);
  const auto block = [&](int64_t g, int64_t begin, int64_t end) {
    const ParamBlock<Op> params(in, g, begin, end);
    const int64_t n = end - begin;
    T constants[count][kChannelBlock];
    double p[Op::kParams];
    T op_constants[Op::kConstants];
    for (int64_t j = 0; j < n; ++j) {
      if (j == 0 || !shared) {
        params.get(j, p);
        Op::precompute(attributes, p, op_constants);
      }
      for (int i = 0; i < Op::kConstants; ++i) constants[i][j] = op_constants[i];
      for (int i = Op::kConstants; i < count; ++i) constants[i][j] = static_cast<T>(params.values[Op::kParams + i - Op::kConstants][j]);
    }
    // Canonical NaNs: vector code rounds to 16 bits without checking for NaN, and 0x7fffffff, a GPU's NaN, would become -0.
    for (auto& constant : constants)
      for (int64_t j = 0; j < n; ++j)
        if (constant[j] != constant[j]) constant[j] = std::numeric_limits<T>::quiet_NaN();
    T* out = k.data.data() + g * k.per_group;
    for (int i = 0; i < count; ++i) {
      T* lane = out + i * partition.length + begin * v.inner;
      if (partition.layout == kPlane)
        for (int64_t j = 0; j < n; ++j) out[(begin + j) * count + i] = constants[i][j];
      else if (v.inner == 1) std::copy_n(constants[i], n, lane);
      else
        for (int64_t j = 0; j < n; ++j) std::fill_n(lane + j * v.inner, v.inner, constants[i][j]);
    }
  };
  for (int64_t g = 0; g < k.groups; ++g) {
    T* out = k.data.data() + g * k.per_group;
    for_channels<Op>(v.channels, [&](int64_t begin, int64_t end) { block(g, begin, end); });
    if (partition.layout == kLanes)
      for (int i = 0; i < count; ++i)
        for (int64_t r = 1; r < partition.repeat; ++r)
          std::copy_n(out + i * partition.length, v.channels * v.inner, out + i * partition.length + r * v.channels * v.inner);
  }
  return k;
}

// The largest run: `values` with one set of constants; `rows` rows of `lanes` lanes, in strips of `strip` rows.
struct RunSize {
  int64_t values, rows, lanes, strip;
};

// staged: values pass through buffers. rows: that a kernel processes at once. Memory-bound ops gain more from long runs
// through memory than from keeping their few constants in L1.
RunSize run_size(bool staged, bool memory_bound, int64_t rows) {
  if (staged) return {kBlock, 1, kLaneBlock, kStripRows};
  return memory_bound ? RunSize{kLongBlock, rows, kLongBlock, rows} : RunSize{kLongBlock, kStripRows, kLaneBlock, kStripRows};
}

// Calls f(run, tile) for the runs of tiles [begin, end).
template <class T, class F>
void for_runs(const Partition& p, const RunSize& size, const View& v, const Constants<T>& k, bool prologue, int64_t begin,
              int64_t end, const F& f) {
  // In a packed tensor, rows of x and of its factor alternate.
  const int64_t period = v.channels * v.inner;
  const auto in = [&](int64_t offset) { return v.packed ? offset + offset / period * period : offset; };
  for (int64_t tile = begin; tile < end; ++tile) {
    Run<T> run;
    run.layout = p.layout;
    run.row = p.length;
    run.in_row = v.packed ? 2 * p.length : p.length;
    if (p.layout == kPlane) {
      const int64_t plane = tile / p.cuts, from = (tile % p.cuts) * kTile, to = std::min(p.length, from + kTile);
      const int64_t g = plane / (p.planes / v.groups), c = plane % v.channels;
      run.constants = k.data.data() + g % k.groups * k.per_group + c * k.count;
      run.scale = prologue ? run.constants + k.count - 2 : nullptr;
      run.shift = prologue ? run.constants + k.count - 1 : nullptr;
      for (int64_t i = from; i < to; i += size.values) {
        run.offset = plane * p.length + i;
        run.in = in(run.offset);
        run.n = std::min(size.values, to - i);
        f(run, tile);
      }
    } else {
      const int64_t g = tile / p.cuts, cut = tile % p.cuts;
      const T* base = k.data.data() + g % k.groups * k.per_group;
      const int64_t last = std::min(p.rows, (cut + 1) * p.rows_per_tile);
      run.stride = p.length;
      for (int64_t strip = cut * p.rows_per_tile; strip < last; strip += size.strip) {
        for (int64_t column = 0; column < p.length; column += size.lanes) {
          run.lane = column;
          run.constants = base + column;
          run.scale = prologue ? run.constants + (k.count - 2) * p.length : nullptr;
          run.shift = prologue ? run.constants + (k.count - 1) * p.length : nullptr;
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
