// How a tensor is cut: units of work, whose sums are added up in an order that depends on the shape alone, and in them the runs
// that a kernel is called with.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "channelwise.h"

namespace ctk::cpu {
namespace {

// Values per block call: three or four float buffers of it stay in L1.
constexpr int64_t kBlock = 1024;
// Values per unit of work. It fixes how sums are grouped, so it must not depend on the machine or the thread count.
constexpr int64_t kUnit = 16384;
// Values per call of a kernel that stages nothing.
constexpr int64_t kLongBlock = 4096;
// Per-lane constants and sums of a block stay in L1 while a tile of rows goes by.
constexpr int64_t kLaneBlock = 256;
constexpr int64_t kTileRows = 16;
// Channels with at least this many neighbouring values run with their constants in registers; others run with one
// constant per lane.
constexpr int64_t kMinRun = 16;
// Per-lane sums: at most this many slots a lane, each adding up float partial sums of kFlushRows rows in double.
constexpr int64_t kMaxCuts = 32;
constexpr int64_t kFlushRows = 64;
static_assert(kFlushRows % kTileRows == 0, "sums are flushed between tiles");
// Fewer values than this are not worth a second thread.
constexpr int64_t kParallelFrom = 32768;

struct Plan {
  Mode mode;
  // kUniform: `planes` runs of `length` values, each cut into `cuts` units.
  // kPerLane: every group is rows of `length` lanes (`repeat` periods of channels * inner), `rows_per_unit` rows a unit.
  int64_t planes = 0, length = 0, cuts = 0;
  int64_t rows = 0, rows_per_unit = 0, repeat = 1, tail = 0;  // tail: lanes in the last row
  int64_t units = 0, unit_values = 0;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Plan make_plan(const View& v) {
  Plan p;
  if (v.channels == 1 || v.inner >= kMinRun) {
    p.mode = kUniform;
    p.planes = v.groups * v.outer * v.channels;
    p.length = v.inner;
    if (v.channels == 1) p.planes = v.groups, p.length = v.outer * v.inner;
    p.cuts = std::max<int64_t>(1, ceil_div(p.length, kUnit));
    p.units = p.planes * p.cuts;
    p.unit_values = std::min(p.length, kUnit);
    return p;
  }
  p.mode = kPerLane;
  const int64_t period = v.channels * v.inner;
  p.repeat = std::max<int64_t>(1, std::min(v.outer, 256 / period));
  p.length = period * p.repeat;
  p.rows = ceil_div(v.outer, p.repeat);
  p.tail = (v.outer - (p.rows - 1) * p.repeat) * period;
  p.rows_per_unit = std::max(ceil_div(p.rows, kMaxCuts), ceil_div(2 * kUnit, p.length));
  p.cuts = ceil_div(p.rows, p.rows_per_unit);
  p.units = v.groups * p.cuts;
  p.unit_values = p.length * std::min(p.rows, p.rows_per_unit);
  return p;
}

template <class F>
void for_units(const Plan& p, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kParallelFrom / std::max<int64_t>(1, p.unit_values));
  if (p.units <= grain) f(0, p.units);
  else torch::stable::parallel_for(0, p.units, grain, f);
}

// Channels whose parameters are read at once: what is made of them, a value per channel, constant and sum, is on the stack,
// which may be as small as 16 KiB (OMP_STACKSIZE).
constexpr int64_t kChannelBlock = 16;

// f(begin, end) over blocks of channels: on several threads where there are many and each takes some hundred instructions.
template <class F>
void for_channels(const Op& op, int64_t channels, const F& f) {
  const auto blocks = [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c += kChannelBlock) f(c, std::min(end, c + kChannelBlock));
  };
  const int64_t grain = op.kernel == Kernel::kHeadEdit ? 8192 : 256;
  if (channels <= grain) blocks(0, channels);
  else torch::stable::parallel_for(0, channels, grain, blocks);
}

// The parameters of a block of channels.
struct ParamBlock {
  double values[kMaxParams][kChannelBlock];

  ParamBlock(const Op& op, const Operands& in, int64_t g, int64_t begin, int64_t end) {
    for (int i = 0; i < op.params(); ++i) {
      const Param& p = in.params[i];
      double* to = values[i];
      if (!p.data) std::fill_n(to, end - begin, p.fallback);
      else if (p.is_double) read(p, static_cast<const double*>(p.data), g, in.view.channels, begin, end, to);
      else read(p, static_cast<const float*>(p.data), g, in.view.channels, begin, end, to);
    }
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

// Constants of every channel: kUniform [group][channel][field]; kPerLane [group][field][lane]. Prologue scale and shift
// are the last two fields.
template <class T>
struct Constants {
  std::vector<T> data;
  int fields = 0;
  int64_t per_group = 0;
  int64_t rows = 1;  // sets of constants; group g uses set g % rows
};

template <class T>
Constants<T> derive(const Op& op, const Operands& in, const Plan& plan, int op_fields) {
  Constants<T> k;
  const View& v = in.view;
  const bool prologue = op.has_prologue();
  k.fields = op_fields + (prologue ? 2 : 0);
  for (int i = 0; i < op.params(); ++i) k.rows = std::max(k.rows, in.params[i].groups);
  const int64_t lanes = plan.mode == kUniform ? v.channels : plan.length;
  k.per_group = k.fields * lanes;
  k.data.resize(k.rows * k.per_group);
  const auto block = [&](int64_t g, int64_t begin, int64_t end) {
    const ParamBlock params(op, in, g, begin, end);
    const int64_t n = end - begin;
    T fields[kMaxFields + 2][kChannelBlock];
    for (int64_t j = 0; j < n; ++j) {
      if (op.kernel == Kernel::kHeadEdit) derive_head_edit<T>(params.values[0] + j, fields[0] + j, kChannelBlock);
      else derive_ctu<T>(op.ctu, params.values[0] + j, fields[0] + j, kChannelBlock);
    }
    // One kind of NaN: rounding to bfloat16 relies on zeros in its low half.
    for (int f = 0; f < op_fields; ++f)
      for (int64_t j = 0; j < n; ++j)
        if (fields[f][j] != fields[f][j]) fields[f][j] = std::numeric_limits<T>::quiet_NaN();
    for (int f = 0; f < k.fields - op_fields; ++f)
      for (int64_t j = 0; j < n; ++j) fields[op_fields + f][j] = constant<T>(params.values[kScaleParam + f][j]);
    T* out = k.data.data() + g * k.per_group;
    for (int f = 0; f < k.fields; ++f) {
      T* lane = out + f * plan.length + begin * v.inner;
      if (plan.mode == kUniform)
        for (int64_t j = 0; j < n; ++j) out[(begin + j) * k.fields + f] = fields[f][j];
      else if (v.inner == 1) std::copy_n(fields[f], n, lane);
      else
        for (int64_t j = 0; j < n; ++j) std::fill_n(lane + j * v.inner, v.inner, fields[f][j]);
    }
  };
  for (int64_t g = 0; g < k.rows; ++g) {
    T* out = k.data.data() + g * k.per_group;
    for_channels(op, v.channels, [&](int64_t begin, int64_t end) { block(g, begin, end); });
    if (plan.mode == kPerLane)
      for (int f = 0; f < k.fields; ++f)
        for (int64_t r = 1; r < plan.repeat; ++r)
          std::copy_n(out + f * plan.length, v.channels * v.inner, out + f * plan.length + r * v.channels * v.inner);
  }
  return k;
}

// What a kernel is called with: n values with one set of constants, or rows of n lanes.
template <class T>
struct Run {
  int64_t offset, n;      // in values
  int64_t rows = 1, row;  // kPerLane: this many rows, `row` values apart
  int64_t lane = 0;       // kPerLane: the first value's lane
  const T* consts;        // first lane's constants
  int64_t stride = 1;     // 1: uniform
  Mode mode;
  const T* scale;         // null: no prologue parameters
  const T* shift;
  int64_t step() const { return mode == kPerLane ? 1 : 0; }
};

// How large a run may be: `values` of them with one set of constants; `rows` rows of `lanes` lanes, in tiles of `tile` rows.
struct Runs {
  int64_t values, rows, lanes, tile;
};

// `staged`: values pass through buffers. `rows`: those a kernel takes at once; it has few constants if they are many, and
// then long runs through memory are worth more than keeping constants in L1.
Runs runs_of(bool staged, int64_t rows) {
  if (staged) return {kBlock, 1, kLaneBlock, kTileRows};
  return rows > 1 ? Runs{kLongBlock, rows, kLongBlock, rows} : Runs{kLongBlock, kTileRows, kLaneBlock, kTileRows};
}

// Calls f(run, unit) for the runs of units [begin, end).
template <class T, class F>
void for_runs(const Plan& p, const Runs& size, const View& v, const Constants<T>& k, int op_fields, bool prologue,
              int64_t begin, int64_t end, const F& f) {
  for (int64_t unit = begin; unit < end; ++unit) {
    Run<T> run;
    run.mode = p.mode;
    run.row = p.length;
    if (p.mode == kUniform) {
      const int64_t plane = unit / p.cuts, from = (unit % p.cuts) * kUnit, to = std::min(p.length, from + kUnit);
      const int64_t g = v.channels == 1 ? plane : plane / (v.outer * v.channels), c = v.channels == 1 ? 0 : plane % v.channels;
      run.consts = k.data.data() + g % k.rows * k.per_group + c * k.fields;
      run.scale = prologue ? run.consts + op_fields : nullptr;
      run.shift = prologue ? run.consts + op_fields + 1 : nullptr;
      for (int64_t i = from; i < to; i += size.values) {
        run.offset = plane * p.length + i;
        run.n = std::min(size.values, to - i);
        f(run, unit);
      }
    } else {
      const int64_t g = unit / p.cuts, cut = unit % p.cuts;
      const T* base = k.data.data() + g % k.rows * k.per_group;
      const int64_t last = std::min(p.rows, (cut + 1) * p.rows_per_unit);
      run.stride = p.length;
      for (int64_t tile = cut * p.rows_per_unit; tile < last; tile += size.tile) {
        for (int64_t column = 0; column < p.length; column += size.lanes) {
          run.lane = column;
          run.consts = base + column;
          run.scale = prologue ? base + op_fields * p.length + column : nullptr;
          run.shift = prologue ? base + (op_fields + 1) * p.length + column : nullptr;
          const int64_t end_row = std::min(last, tile + size.tile);
          for (int64_t row = tile; row < end_row; row += run.rows) {
            const bool short_row = row == p.rows - 1;
            run.rows = short_row ? 1 : std::min({size.rows, end_row - row, p.rows - 1 - row});
            run.offset = g * v.outer * v.channels * v.inner + row * p.length + column;
            run.n = std::min(size.lanes, (short_row ? p.tail : p.length) - column);
            if (run.n > 0) f(run, unit);
          }
        }
      }
    }
  }
}

// A thread's sums of one lane each, which move on to their unit's slot, in double, before float runs out of digits.
template <class T>
class LaneSums {
 public:
  LaneSums(int sums, int64_t length, double* slots) : size_(sums * length), slots_(slots), lanes_(slots ? size_ : 0) {}
  ~LaneSums() { flush(); }

  // To be called before `rows` more rows of `unit` are added.
  void expect(int64_t unit, int64_t rows) {
    if (unit != unit_ || rows_ == kFlushRows) {
      flush();
      first_ = first_ || unit != unit_;
      unit_ = unit, rows_ = 0;
    }
    rows_ += rows;
  }
  T* data() { return lanes_.data(); }

 private:
  void flush() {
    if (unit_ < 0) return;
    double* slot = slots_ + unit_ * size_;
    for (int64_t i = 0; i < size_; ++i) slot[i] = (first_ ? 0.0 : slot[i]) + lanes_[i];
    std::fill(lanes_.begin(), lanes_.end(), T(0));
    first_ = false;
  }
  int64_t size_;
  double* slots_;
  std::vector<T> lanes_;
  int64_t unit_ = -1, rows_ = 0;
  bool first_ = true;  // the unit's slot has not been written
};

}  // namespace
}  // namespace ctk::cpu
