#include "driver.h"

#include <cstring>
#include <memory>

#include "partition.h"

namespace ctk::cpu {
namespace {

// Results of this many bytes leave the private caches before they are read. A memory-bound op then streams its stores past the
// caches, which saves reading the lines first: 1 to 20 % faster from 8 MiB on, in float and bfloat16, on 2 cores, even if the
// result is read at once. Arithmetic-bound ops lose by it.
constexpr int64_t kStreamFrom = int64_t(8) << 20;
template <class Op>
bool streams(const View& v, DType t) { return Op::kMemoryBound && v.numel() * size_of(t) >= kStreamFrom; }

// Makes this thread's streamed stores visible to other threads.
void drain() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

bool aligned(const void* p, int64_t row_bytes) { return reinterpret_cast<uintptr_t>(p) % 64 == 0 && row_bytes % 64 == 0; }

// Staging buffers are on the heap: a worker's stack may be as small as 16 KiB (OMP_STACKSIZE).
template <class T>
struct alignas(64) Buffer {
  T values[kBlock];
};

// Partition, constants and kernels of a call, forward or backward.
template <class Op, class T>
struct CallContext {
  const Operands& in;
  const Kernel kernel;
  const BlockKernels<T>& blocks;
  const Staging<T>& staging;
  const bool has_scale, prologue, uniform;
  const Partition partition;
  const Constants<T> constants;
  const int64_t size;
  const bool native;  // memory holds the compute type

  CallContext(const typename Op::Attributes& attributes, const Operands& operands, bool forward)
      : in(operands),
        kernel(kernel_of<Op>(Op::variant(attributes))),
        blocks(kernel_table().block_kernels<T>(kernel, in.dtype)),
        staging(kernel_table().staging<T>()),
        has_scale(Op::kPrologue && in.params[Op::kParams].is_given()),
        prologue(Op::kPrologue && (in.residual || has_scale || in.params[Op::kParams + 1].is_given())),
        uniform(is_uniform<Op>(in)),
        partition(partition_of(in.view, forward && prologue && uniform ? kMinAffinePlane : kMinPlane)),
        constants(precompute<Op, T>(attributes, in, partition, prologue,
                                    uniform && (partition.layout == kPlane || (forward && prologue)))),
        size(size_of(in.dtype)),
        native(in.dtype == (sizeof(T) == 8 ? DType::kDouble : DType::kFloat)) {}

  const MemoryKernels* memory_kernels() const { return kernel_table().memory_kernels(kernel, in.dtype, prologue); }

  // Address of value `offset` of a tensor; null if it is absent. Runs start at run.in in tensors with the layout of x, and at
  // run.offset in others.
  const char* at(const void* p, int64_t offset) const { return p ? static_cast<const char*>(p) + offset * size : nullptr; }
  char* at(void* p, int64_t offset) const { return p ? static_cast<char*>(p) + offset * size : nullptr; }

  // n values in the compute type: in place if memory holds that, else converted into `buffer`. Null if absent.
  const T* load(const char* p, int64_t n, T* buffer) const {
    if (native || !p) return reinterpret_cast<const T*>(p);
    staging.load[static_cast<int>(in.dtype)](p, buffer, n);
    return buffer;
  }
  // Where to compute values that will be stored to p: in place if memory holds the compute type, else in `buffer`.
  T* destination(char* p, T* buffer) const { return native && p ? reinterpret_cast<T*>(p) : buffer; }
  // Stores values to p, unless they are there already or p is null.
  void store(const T* values, char* p, int64_t n) const {
    if (p && static_cast<const void*>(values) != p) staging.store[static_cast<int>(in.dtype)](values, p, n);
  }
  // The op's input: x, or scale x + shift + residual.
  const T* input(const T* x, const Run<T>& run, T* residual_buffer, T* buffer) const {
    if (!prologue) return x;
    const T* residual = load(at(in.residual, run.in), run.n, residual_buffer);
    staging.prologue(x, residual, run.scale, run.shift, run.step(), buffer, run.n);
    return buffer;
  }
};

template <class Op, class T>
void forward_as(const typename Op::Attributes& attributes, const Operands& in, void* y) {
  const CallContext<Op, T> call(attributes, in, true);
  const BlockKernels<T>& blocks = call.blocks;
  const MemoryKernels* memory = call.memory_kernels();
  const bool in_place = y == in.x;
  const bool stream = !in_place && streams<Op>(in.view, in.dtype);
  const RunSize sizes = run_size(!memory && (!call.native || call.prologue || in_place), Op::kMemoryBound);
  for_tiles(call.partition, [&](int64_t begin, int64_t end) {
    const auto buffers = std::make_unique_for_overwrite<Buffer<T>[]>(memory ? 0 : 5);
    for_runs(call.partition, sizes, in.view, call.constants, begin, end, [&](const Run<T>& run, int64_t) {
      char* const out = call.at(y, run.offset);
      const char* const x = call.at(in.x, run.in);
      const char* const factor = call.at(in.factor, run.in);
      if constexpr (sizeof(T) == 4) {
        if (memory) {
          memory->forward[run.layout][call.prologue](
              {.run = run, .x = x, .residual = call.at(in.residual, run.in), .factor = factor, .y = out,
               .stream = stream && aligned(out, run.rows > 1 ? run.row * call.size : 0)});
          return;
        }
      }
      const T* w = call.input(call.load(x, run.n, buffers[0].values), run, buffers[1].values, buffers[2].values);
      const T* f = call.load(factor, run.n, buffers[4].values);
      T* to = call.destination(in_place ? nullptr : out, buffers[3].values);
      blocks.forward[run.layout](w, f, to, run);
      call.store(to, out, run.n);
    });
    if (stream) drain();
  });
}

// Reduces partial sums to parameter gradients, in an order that depends on the shape alone. A slot per tile: kPlane
// [tile][sum]; kLanes [group * cut][sum][lane].
template <class Op>
void reduce_partials(const typename Op::Attributes& attributes, const Operands& in, const Partition& partition,
                     const double* slots, int sums, const Gradients& out) {
  constexpr int kParams = kParamsOf<Op>;
  const View& v = in.view;
  const int64_t channels = v.channels;
  std::vector<double> grads[kParams], per_channel[kParams];  // per_channel: within one group
  for (int i = 0; i < kParams; ++i) {
    if (!out.params[i]) continue;
    grads[i].assign(in.params[i].numel(), 0.0);
    per_channel[i].resize(channels);
  }
  std::vector<double> columns;
  for (int64_t group = 0; group < v.groups; ++group) {
    if (partition.layout == kLanes) {
      const int64_t width = sums * partition.length;
      const double* first = slots + group * partition.cuts * width;
      columns.assign(first, first + width);
      const auto add = [&](int64_t begin, int64_t end) {
        for (int64_t cut = 1; cut < partition.cuts; ++cut)
          for (int64_t i = begin; i < end; ++i) columns[i] += first[cut * width + i];
      };
      if (width * partition.cuts < kParallelFrom) add(0, width);
      else torch::stable::parallel_for(0, width, kLaneBlock, add);
    }
    for_channels<Op>(channels, [&](int64_t begin, int64_t end) {
      const ParamBlock<Op::kParams> params(in.params, channels, group, begin, end);
      const int64_t n = end - begin;
      double totals[kSumsOf<Op>][kChannelBlock] = {};
      for (int s = 0; s < sums; ++s) {
        double* total = totals[s];
        if (partition.layout == kPlane) {
          const int64_t per_group = partition.planes / v.groups;
          for (int64_t plane = begin; plane < per_group; plane += channels)
            for (int64_t j = 0; j < n; ++j)
              for (int64_t cut = 0; cut < partition.cuts; ++cut)
                total[j] += slots[((group * per_group + plane + j) * partition.cuts + cut) * sums + s];
        } else {
          for (int64_t r = 0; r < partition.repeat; ++r) {
            const double* column = columns.data() + s * partition.length + (r * channels + begin) * v.inner;
            for (int64_t j = 0; j < n; ++j)
              for (int64_t i = 0; i < v.inner; ++i) total[j] += column[j * v.inner + i];
          }
        }
      }
      for (int64_t j = 0; j < n; ++j) {
        double p[Op::kParams], op_sums[Op::kSums], values[kParams];
        params.get(j, p);
        for (int s = 0; s < Op::kSums; ++s) op_sums[s] = totals[s][j];
        Op::parameter_gradients(attributes, p, op_sums, values);
        for (int i = Op::kParams; i < kParams; ++i) values[i] = totals[Op::kSums + i - Op::kParams][j];
        for (int i = 0; i < kParams; ++i)
          if (out.params[i]) per_channel[i][begin + j] = values[i];
      }
    });
    for (int i = 0; i < kParams; ++i) {
      if (!out.params[i]) continue;
      const int64_t count = in.params[i].count, run = channels / count;
      double* to = grads[i].data() + in.params[i].index(group, 0, channels);
      for (int64_t n = 0; n < count; ++n)
        for (int64_t c = n * run; c < (n + 1) * run; ++c) to[n] += per_channel[i][c];
    }
  }
  for (int i = 0; i < kParams; ++i) {
    if (!out.params[i]) continue;
    const auto convert = [&](auto* to) { for (double grad : grads[i]) *to++ = static_cast<std::decay_t<decltype(*to)>>(grad); };
    if (in.params[i].is_double) convert(static_cast<double*>(out.params[i]));
    else convert(static_cast<float*>(out.params[i]));
  }
}

template <class Op, class T>
void backward_as(const typename Op::Attributes& attributes, const Operands& in, const void* dy, const Gradients& out) {
  const CallContext<Op, T> call(attributes, in, false);
  const BlockKernels<T>& blocks = call.blocks;
  const Partition& partition = call.partition;
  const bool op_sums = std::any_of(out.params, out.params + Op::kParams, [](void* p) { return p; });
  const bool prologue_sums = Op::kPrologue && (out.params[Op::kParams] || out.params[Op::kParams + 1]);
  const bool any_sums = op_sums || prologue_sums;
  const MemoryKernels* memory = prologue_sums ? nullptr : call.memory_kernels();
  const int sums = prologue_sums ? kSumsOf<Op> : blocks.sums;
  const bool stream = streams<Op>(in.view, in.dtype);
  const bool staged = !memory && (!call.native || call.prologue || prologue_sums || !out.dx || (in.factor && !out.dfactor));
  const RunSize sizes = run_size(staged, Op::kMemoryBound);

  const bool lane_sums = any_sums && partition.layout == kLanes;
  std::unique_ptr<double[]> slots;
  if (lane_sums) slots.reset(new double[partition.tiles * sums * partition.length]);  // LaneSums writes all of them
  else if (any_sums) slots.reset(new double[partition.tiles * sums]());

  for_tiles(partition, [&](int64_t begin, int64_t end) {
    const auto buffers = std::make_unique_for_overwrite<Buffer<T>[]>(memory ? 0 : 8);
    LaneSums<T> lanes(sums, partition.length, lane_sums ? slots.get() : nullptr);
    for_runs(partition, sizes, in.view, call.constants, begin, end, [&](const Run<T>& run, int64_t tile) {
      if (lane_sums && run.lane == 0) lanes.expect(tile, run.rows);
      T* lane = lanes.data() + run.lane;
      double* totals = any_sums && !lane_sums ? slots.get() + tile * sums : nullptr;
      char *const dx = call.at(out.dx, run.in), *const dfactor = call.at(out.dfactor, run.in);
      char* const dresidual = call.at(out.dresidual, run.in);
      const char *const factor = call.at(in.factor, run.in), *const up = call.at(dy, run.offset);
      if constexpr (sizeof(T) == 4) {
        if (memory) {
          const int64_t row = run.rows > 1 ? run.in_row * call.size : 0;
          memory->backward[run.layout][call.prologue][op_sums](
              {.run = run, .x = call.at(in.x, run.in), .residual = call.at(in.residual, run.in), .factor = factor, .dy = up,
               .dx = dx, .dresidual = dresidual, .dfactor = dfactor, .totals = totals, .lanes = lane,
               .stream = stream && aligned(dx, row) && aligned(dfactor, row)});
          return;
        }
      }
      const T* x = call.load(call.at(in.x, run.in), run.n, buffers[0].values);
      const T* w = call.input(x, run, buffers[1].values, buffers[2].values);
      const T* f = call.load(factor, run.n, buffers[6].values);
      const T* upstream = call.load(up, run.n, buffers[3].values);
      T* g = call.destination(dresidual ? dresidual : call.has_scale ? nullptr : dx, buffers[4].values);
      T* df = call.destination(dfactor, buffers[7].values);
      blocks.backward[run.layout][op_sums](w, f, upstream, g, df, run, totals, lane);
      if (prologue_sums) {
        if (totals) call.staging.prologue_plane_sums(g, x, totals + Op::kSums, run.n);
        else call.staging.prologue_lane_sums(g, x, lane + Op::kSums * run.row, lane + (Op::kSums + 1) * run.row, run.n);
      }
      call.store(df, dfactor, run.n);
      call.store(g, dresidual, run.n);
      if (dx && call.has_scale) {
        T* scaled = call.destination(dx, buffers[5].values);
        call.staging.scaled(g, run.scale, run.step(), scaled, run.n);
        call.store(scaled, dx, run.n);
      } else {
        call.store(g, dx, run.n);
      }
    });
    if (stream) drain();
  });
  if (any_sums) reduce_partials<Op>(attributes, in, partition, slots.get(), sums, out);
}

// Calls f(i) for i in [0, n), on several threads if n is large.
template <class F>
void for_gates(int64_t n, const F& f) {
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  };
  if (n < 4096) range(0, n);
  else torch::stable::parallel_for(0, n, 1024, range);
}

}  // namespace

template <class Op>
void Driver::forward(const typename Op::Attributes& attributes, const Operands& in, void* y) {
  if (in.dtype == DType::kDouble) forward_as<Op, double>(attributes, in, y);
  else forward_as<Op, float>(attributes, in, y);
}

template <class Op>
void Driver::backward(const typename Op::Attributes& attributes, const Operands& in, const void* dy, const Gradients& out) {
  if (in.dtype == DType::kDouble) backward_as<Op, double>(attributes, in, dy, out);
  else backward_as<Op, float>(attributes, in, dy, out);
}

#define CTK_OP(name, Op, ...)                                                        \
  template void Driver::forward<Op>(const Op::Attributes&, const Operands&, void*); \
  template void Driver::backward<Op>(const Op::Attributes&, const Operands&, const void*, const Gradients&);
#include "../ops.def"

void Driver::gates_forward(bool is_double, const Gates& gates) {
  for_gates(gates.n, [&](int64_t i) { is_double ? gate_forward<double>(gates, i) : gate_forward<float>(gates, i); });
}

void Driver::gates_backward(bool is_double, const Gates& gates) {
  for_gates(gates.n, [&](int64_t i) { is_double ? gate_backward<double>(gates, i) : gate_backward<float>(gates, i); });
}

}  // namespace ctk::cpu
