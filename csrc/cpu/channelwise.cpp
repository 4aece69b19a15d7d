#include "channelwise.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

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

// f(begin, end) over the channels: on several threads where there are many, since each takes some hundred instructions.
template <class F>
void for_channels(int64_t channels, const F& f) {
  constexpr int64_t grain = 256;
  if (channels <= grain) f(0, channels);
  else torch::stable::parallel_for(0, channels, grain, f);
}

// Constants of every channel: kUniform [group][channel][field]; kPerLane [group][field][lane]. Prologue scale and shift
// are the last two fields.
template <class T>
struct Constants {
  std::vector<T> data;
  int fields = 0;
  int64_t per_group = 0;
  int64_t rows = 1;  // sets of constants; group g uses set g % rows
};

void read_params(const Op& op, const Operands& in, int64_t g, int64_t c, double* p) {
  for (int i = 0; i < op.params(); ++i) p[i] = in.params[i].at(g, c, in.view.channels);
}

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
  const auto channels = [&](int64_t g, int64_t begin, int64_t end) {
    double p[kMaxParams];
    T one[kMaxFields + 2], *out = k.data.data() + g * k.per_group;
    for (int64_t c = begin; c < end; ++c) {
      read_params(op, in, g, c, p);
      if (op.kernel == Kernel::kHeadEdit) derive_head_edit<T>(p, one, 1);
      else derive_ctu<T>(op.ctu, p, one, 1);
      // One kind of NaN: rounding to bfloat16 relies on zeros in its low half.
      for (int f = 0; f < op_fields; ++f)
        if (one[f] != one[f]) one[f] = std::numeric_limits<T>::quiet_NaN();
      if (prologue) one[op_fields] = static_cast<T>(p[kScaleParam]), one[op_fields + 1] = static_cast<T>(p[kShiftParam]);
      if (plan.mode == kUniform) {
        std::copy(one, one + k.fields, out + c * k.fields);
      } else {
        for (int f = 0; f < k.fields; ++f) std::fill_n(out + f * plan.length + c * v.inner, v.inner, one[f]);
      }
    }
  };
  for (int64_t g = 0; g < k.rows; ++g) {
    T* out = k.data.data() + g * k.per_group;
    for_channels(v.channels, [&](int64_t begin, int64_t end) { channels(g, begin, end); });
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

// Results of this many bytes are out of the private caches before anyone reads them. An op that does little but move data
// (one that takes several rows) then writes past the caches, which saves reading the lines first: with an op that reads the
// result at once, 1 to 20 % faster from 8 MiB on, in float and bfloat16, on 2 cores. Ops bound by arithmetic lose by it.
constexpr int64_t kStreamFrom = int64_t(8) << 20;
bool streams(int64_t rows, const View& v, DType t) { return rows > 1 && v.numel() * size_of(t) >= kStreamFrom; }

// Makes this thread's streamed results visible to the others.
void drain() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

bool aligned(const void* p, int64_t row_bytes) { return reinterpret_cast<uintptr_t>(p) % 64 == 0 && row_bytes % 64 == 0; }

const char* at(const void* p, int64_t i, int64_t size) { return static_cast<const char*>(p) + i * size; }
char* at(void* p, int64_t i, int64_t size) { return static_cast<char*>(p) + i * size; }
// The same for a tensor that may be absent.
const char* offset(const void* p, int64_t i, int64_t size) { return p ? at(p, i, size) : nullptr; }
char* offset(void* p, int64_t i, int64_t size) { return p ? at(p, i, size) : nullptr; }

// Values in the compute type: in place where the tensor already has it, else converted into `buffer`.
template <class T>
const T* staged(const void* from, int64_t offset, DType t, bool direct, const Staging<T>& stage, T* buffer, int64_t n) {
  const char* p = at(from, offset, size_of(t));
  if (direct) return reinterpret_cast<const T*>(p);
  stage.load[static_cast<int>(t)](p, buffer, n);
  return buffer;
}

bool uses(const Param& p) { return p.data != nullptr; }

template <class T>
void forward_as(const Op& op, const Operands& in, void* y) {
  const BlockTable& table = *block_table();
  const BlockOps<T>& ops = table.ops<T>(op.kernel, in.dtype);
  const Staging<T>& stage = table.stage<T>();
  const Plan plan = make_plan(in.view);
  const Constants<T> k = derive<T>(op, in, plan, ops.fields);
  const bool direct = in.dtype == (sizeof(T) == 8 ? DType::kDouble : DType::kFloat);
  const bool prologue = op.has_prologue() && (in.residual || uses(in.params[kScaleParam]) || uses(in.params[kShiftParam]));
  const DirectOps* whole = table.direct_ops(op.kernel, in.dtype, prologue);
  const bool in_place = y == in.x;
  const bool stream = !in_place && streams(ops.rows, in.view, in.dtype);
  const Runs runs = runs_of(!whole && (!direct || prologue || in_place), ops.rows);
  const int64_t size = size_of(in.dtype);
  for_units(plan, [&](int64_t begin, int64_t end) {
    alignas(64) T x_buffer[kBlock], r_buffer[kBlock], w_buffer[kBlock], y_buffer[kBlock];
    for_runs(plan, runs, in.view, k, ops.fields, prologue, begin, end, [&](const Run<T>& run, int64_t) {
      char* out = at(y, run.offset, size);
      if constexpr (sizeof(T) == 4) {
        if (whole) {
          const char* from = at(in.x, run.offset, size);
          const bool past = stream && aligned(out, run.rows > 1 ? run.row * size : 0);
          const Prologue before{run.scale, run.shift, offset(in.residual, run.offset, size), nullptr};
          if (run.mode == kUniform) whole->forward_uniform[prologue](from, out, run.consts, &before, run.n, past);
          else whole->forward_lanes[prologue](from, out, run.consts, run.stride, &before, run.rows, run.row, run.n, past);
          return;
        }
      }
      const T* w = staged(in.x, run.offset, in.dtype, direct, stage, x_buffer, run.n);
      if (prologue) {
        const T* r = in.residual ? staged(in.residual, run.offset, in.dtype, direct, stage, r_buffer, run.n) : nullptr;
        stage.prologue(w, r, run.scale, run.shift, run.step(), w_buffer, run.n);
        w = w_buffer;
      }
      T* to = direct && !in_place ? reinterpret_cast<T*>(out) : y_buffer;
      if (run.mode == kUniform) ops.forward_uniform(w, to, run.consts, run.n);
      else ops.forward_lanes(w, to, run.consts, run.stride, run.rows, run.row, run.n);
      if (to == y_buffer) stage.store[static_cast<int>(in.dtype)](y_buffer, out, run.n);
    });
    if (stream) drain();
  });
}

template <class T>
void backward_as(const Op& op, const Operands& in, const void* dy, const Gradients& out) {
  const BlockTable& table = *block_table();
  const BlockOps<T>& ops = table.ops<T>(op.kernel, in.dtype);
  const Staging<T>& stage = table.stage<T>();
  const View& v = in.view;
  const Plan plan = make_plan(v);
  const Constants<T> k = derive<T>(op, in, plan, ops.fields);
  const bool direct = in.dtype == (sizeof(T) == 8 ? DType::kDouble : DType::kFloat);
  const bool with_prologue = op.has_prologue();
  const bool has_scale = with_prologue && uses(in.params[kScaleParam]);
  const bool prologue = with_prologue && (in.residual || has_scale || uses(in.params[kShiftParam]));
  const bool prologue_sums = with_prologue && (out.params[kScaleParam] || out.params[kShiftParam]);
  bool op_sums = false;
  for (int i = 0; i < (with_prologue ? int(kScaleParam) : op.params()); ++i) op_sums = op_sums || out.params[i];
  const DirectOps* whole = prologue_sums ? nullptr : table.direct_ops(op.kernel, in.dtype, prologue);
  // The op's own sums come first, the prologue's at the index finish_ctu expects.
  const int sums = prologue_sums ? int(kCtuSums) : ops.sums;
  const int64_t size = size_of(in.dtype);
  const bool stream = streams(ops.rows, v, in.dtype);
  const Runs runs = runs_of(!whole && (!direct || prologue || prologue_sums || !out.dx), ops.rows);

  // One slot of partial sums per unit: kUniform [unit][sum]; kPerLane [group * cut][sum][lane].
  const bool any_sums = op_sums || prologue_sums;
  const bool lane_sums = any_sums && plan.mode == kPerLane;
  std::unique_ptr<double[]> slots;
  if (lane_sums) slots.reset(new double[v.groups * plan.cuts * sums * plan.length]);  // every one is written
  else if (any_sums) slots.reset(new double[plan.units * sums]());

  for_units(plan, [&](int64_t begin, int64_t end) {
    alignas(64) T x_buffer[kBlock], r_buffer[kBlock], w_buffer[kBlock], dy_buffer[kBlock], g_buffer[kBlock], dx_buffer[kBlock];
    LaneSums<T> lanes(sums, plan.length, lane_sums ? slots.get() : nullptr);
    for_runs(plan, runs, v, k, ops.fields, prologue, begin, end, [&](const Run<T>& run, int64_t unit) {
      if (lane_sums && run.lane == 0) lanes.expect(unit, run.rows);
      T* lane = lanes.data() + run.lane;
      double* totals = any_sums && !lane_sums ? slots.get() + unit * sums : nullptr;
      if constexpr (sizeof(T) == 4) {
        if (whole) {
          const char *from = at(in.x, run.offset, size), *upstream = at(dy, run.offset, size);
          char* to = offset(out.dx, run.offset, size);
          const bool past = stream && aligned(to, run.rows > 1 ? run.row * size : 0);
          const Prologue before{run.scale, run.shift, offset(in.residual, run.offset, size), offset(out.dresidual, run.offset, size)};
          if (run.mode == kUniform)
            whole->backward_uniform[prologue][op_sums](from, upstream, to, run.consts, &before, totals, run.n, past);
          else
            whole->backward_lanes[prologue][op_sums](from, upstream, to, run.consts, run.stride, &before, lane, run.rows, run.row, run.n, past);
          return;
        }
      }
      const T* x = staged(in.x, run.offset, in.dtype, direct, stage, x_buffer, run.n);
      const T* w = x;
      if (prologue) {
        const T* r = in.residual ? staged(in.residual, run.offset, in.dtype, direct, stage, r_buffer, run.n) : nullptr;
        stage.prologue(x, r, run.scale, run.shift, run.step(), w_buffer, run.n);
        w = w_buffer;
      }
      const T* upstream = staged(dy, run.offset, in.dtype, direct, stage, dy_buffer, run.n);
      void* g_out = out.dresidual ? out.dresidual : (has_scale ? nullptr : out.dx);
      T* g = direct && g_out ? reinterpret_cast<T*>(at(g_out, run.offset, size)) : g_buffer;
      if (run.mode == kUniform) ops.backward_uniform[op_sums](w, upstream, g, run.consts, totals, run.n);
      else ops.backward_lanes[op_sums](w, upstream, g, run.consts, run.stride, lane, run.rows, run.row, run.n);
      if (prologue_sums) {
        if (totals) stage.prologue_uniform_sums(g, x, totals + kCtuScaleSum, run.n);
        else stage.prologue_lane_sums(g, x, lane + kCtuScaleSum * plan.length, lane + kCtuShiftSum * plan.length, run.n);
      }
      const auto store = [&](const T* from, void* to) {
        char* p = at(to, run.offset, size);
        if (static_cast<const void*>(from) != p) stage.store[static_cast<int>(in.dtype)](from, p, run.n);
      };
      if (out.dresidual) store(g, out.dresidual);
      if (out.dx && has_scale) {
        T* dx = direct ? reinterpret_cast<T*>(at(out.dx, run.offset, size)) : dx_buffer;
        stage.scaled(g, run.scale, run.step(), dx, run.n);
        store(dx, out.dx);
      } else if (out.dx) {
        store(g, out.dx);
      }
    });
    if (stream) drain();
  });

  if (!any_sums) return;

  // Second stage, in an order that depends on the shape alone: slots -> channels -> parameters.
  const int64_t channels = v.channels;
  std::vector<double> grads[kMaxParams];
  for (int i = 0; i < op.params(); ++i)
    if (out.params[i]) grads[i].assign(in.params[i].numel(), 0.0);
  std::vector<double> columns;
  bool shared = false;
  for (int i = 0; i < op.params(); ++i) shared = shared || (out.params[i] && in.params[i].count != channels);
  for (int64_t group = 0; group < v.groups; ++group) {
    if (plan.mode == kPerLane) {
      const int64_t width = sums * plan.length;
      const double* first = slots.get() + group * plan.cuts * width;
      columns.assign(first, first + width);
      const auto add = [&](int64_t begin, int64_t end) {
        for (int64_t cut = 1; cut < plan.cuts; ++cut)
          for (int64_t i = begin; i < end; ++i) columns[i] += first[cut * width + i];
      };
      if (width * plan.cuts < kParallelFrom) add(0, width);
      else torch::stable::parallel_for(0, width, kLaneBlock, add);
    }
    const auto finish = [&](int64_t begin, int64_t end) {
      double p[kMaxParams], total[kMaxSums] = {}, grad[kMaxParams];
      for (int64_t c = begin; c < end; ++c) {
        for (int s = 0; s < sums; ++s) {
          double sum = 0;
          if (plan.mode == kUniform) {
            const int64_t per_group = plan.planes / v.groups;
            for (int64_t plane = c; plane < per_group; plane += channels)
              for (int64_t cut = 0; cut < plan.cuts; ++cut)
                sum += slots[((group * per_group + plane) * plan.cuts + cut) * sums + s];
          } else {
            for (int64_t r = 0; r < plan.repeat; ++r)
              for (int64_t i = 0; i < v.inner; ++i) sum += columns[s * plan.length + (r * channels + c) * v.inner + i];
          }
          total[s] = sum;
        }
        read_params(op, in, group, c, p);
        if (op.kernel == Kernel::kHeadEdit) finish_head_edit(p, total, grad);
        else finish_ctu(op.ctu, p, total, grad);
        for (int i = 0; i < op.params(); ++i)
          if (out.params[i]) grads[i][in.params[i].index(group, c, channels)] += grad[i];
      }
    };
    if (shared) finish(0, channels);  // channels add to the same gradient
    else for_channels(channels, finish);
  }
  for (int i = 0; i < op.params(); ++i) {
    if (!out.params[i]) continue;
    if (in.params[i].is_double) std::copy(grads[i].begin(), grads[i].end(), static_cast<double*>(out.params[i]));
    else std::transform(grads[i].begin(), grads[i].end(), static_cast<float*>(out.params[i]), [](double d) { return static_cast<float>(d); });
  }
}

}  // namespace

void forward(const Op& op, const Operands& in, void* y) {
  if (in.view.numel() == 0) return;
  if (in.dtype == DType::kDouble) forward_as<double>(op, in, y);
  else forward_as<float>(op, in, y);
}

void backward(const Op& op, const Operands& in, const void* dy, const Gradients& out) {
  if (in.view.numel() == 0) {
    for (int i = 0; i < op.params(); ++i)
      if (out.params[i]) std::memset(out.params[i], 0, in.params[i].numel() * (in.params[i].is_double ? 8 : 4));
    return;
  }
  if (in.dtype == DType::kDouble) backward_as<double>(op, in, dy, out);
  else backward_as<float>(op, in, dy, out);
}

}  // namespace ctk::cpu
