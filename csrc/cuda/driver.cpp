#include "driver.h"

#include <string>

#include "args.h"
#include "partition.h"

namespace ctk::cuda {
namespace {

const char* type_name(DType t) {
  switch (t) {
    case DType::kFloat: return "_f32";
    case DType::kDouble: return "_f64";
    case DType::kBFloat16: return "_bf16";
    case DType::kHalf: return "_f16";
  }
  throw std::invalid_argument("ctkernels: no such dtype");
}

// The kernels that ops.def lists for a variant.
struct KernelInfo {
  int sums = 0;
  bool plain = false, double_vector = false;
};
constexpr KernelInfo info_of(Kernel k) {
  KernelInfo info;
#define CTK_KERNELS(stem, Op, variant) \
  if (k == Kernel::stem) info.sums = Op::Arithmetic<Op::Variant::variant, float, Exact>::Gradients::kSums;
#define CTK_PLAIN_KERNELS(stem, Op, variant) info.plain = info.plain || k == Kernel::stem;
#define CTK_DOUBLE_KERNELS(stem, Op, variant) info.double_vector = info.double_vector || k == Kernel::stem;
#include "../ops.def"
  return info;
}

// Shared memory is rounded up to 16 bytes: ptxas may merge reads of neighbouring values, up to that.
template <class Args>
void launch(Driver& driver, const std::string& kernel, int64_t grid, int block_x, int block_y, int64_t shared, const Args& args) {
  if (grid > 0x7fffffff) throw std::runtime_error("ctkernels: a tensor too large for one launch (" + kernel + ")");
  driver.launch({kernel.c_str(), static_cast<uint32_t>(grid), static_cast<uint32_t>(block_x), static_cast<uint32_t>(block_y),
                 static_cast<uint32_t>(ceil_div(shared, 16) * 16), &args, sizeof(args), nullptr, nullptr, 0});
}

bool aligned(std::initializer_list<const void*> pointers) {
  return std::none_of(pointers.begin(), pointers.end(), [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16; });
}

uint32_t narrow(int64_t v) {
  if (v < 0 || v > 0xffffffffll) throw std::runtime_error("ctkernels: a tensor too large to be cut into blocks");
  return static_cast<uint32_t>(v);
}

int64_t power_of_two(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

ParamRef reference(const Param& p, int64_t channels) {
  const bool spread = p.count > 1;
  return {p.data, p.fallback, narrow(p.groups), narrow(p.count), narrow(spread ? channels / p.count : channels), p.is_double};
}

// The channelwise kernel of a call: its arguments, and its name without the stem and the pass.
template <class Op>
struct Call {
  Kernel kernel;
  Partition partition;
  Channelwise<Op> args{};
  std::string suffix;

  Call(const typename Op::Attributes& attributes, const Operands& in, bool sums, bool is_aligned, Driver& driver)
      : kernel(kernel_of<Op>(Op::variant(attributes))),
        partition(partition_for(in.view, size_of(in.dtype), sums,
                                is_aligned && (in.dtype != DType::kDouble || info_of(kernel).double_vector))) {
    const View& v = in.view;
    const Partition& p = partition;
    const uint32_t inner = p.plane ? 1 : narrow(v.inner);
    args.tiling = {p.group, p.row, p.width, p.cols_per, narrow(p.rows), narrow(p.rows_per), narrow(p.row_cuts), narrow(p.col_cuts),
                   narrow(v.channels), inner, v.packed};
    args.x = in.x, args.residual = in.residual, args.factor = in.factor, args.attributes = attributes;
    for (int i = 0; i < kParamsOf<Op>; ++i) args.params[i] = reference(in.params[i], v.channels);
    bool plain = info_of(kernel).plain;
    if constexpr (Op::kPrologue) plain = plain && !in.residual && !in.params[Op::kParams].is_given() && !in.params[Op::kParams + 1].is_given();
    const char* form = !p.vector ? "_scalar" : plain ? "_plain" : "_vector";
    suffix = std::string(type_name(in.dtype)) + (p.plane ? "_plane" : "_lanes") + form;
    if constexpr (Op::kTable > 0) {
      if (Op::needs_table(attributes) && in.dtype != DType::kDouble) make_table(in, driver);
    }
  }

  void run(const char* pass, int64_t shared, Driver& driver) const {
    const std::string name = std::string(kKernelStems[static_cast<int>(kernel)]) + pass + suffix;
    launch(driver, name, partition.blocks, partition.threads, 1, shared, args);
  }

 private:
  void make_table(const Operands& in, Driver& driver) {
    const bool grouped = std::any_of(in.params, in.params + Op::kParams, [](const Param& p) { return p.groups > 1; });
    const int64_t rows = grouped ? in.view.groups : 1, count = narrow(rows * in.view.channels);
    auto* to = static_cast<float*>(driver.allocate(Op::kTable * count * sizeof(float)));
    args.table = to, args.table_rows = narrow(rows);
    Precompute<Op> table{to, narrow(rows), narrow(in.view.channels), {}, args.attributes};
    std::copy(std::begin(args.params), std::end(args.params), table.params);
    launch(driver, std::string("ctk_") + kName<Op> + "_precompute", ceil_div(count, kTableThreads), kTableThreads, 1, 0, table);
  }
};

}  // namespace

template <class Op>
void Driver::forward(const typename Op::Attributes& attributes, const Operands& in, void* y) {
  Call<Op> call(attributes, in, false, aligned({in.x, in.residual, in.factor, y}), *this);
  call.args.y = y;
  call.run("_forward", 0, *this);
}

template <class Op>
void Driver::backward(const typename Op::Attributes& attributes, const Operands& in, const void* dy, const Gradients& out) {
  constexpr int kParams = kParamsOf<Op>, kSums = kSumsOf<Op>;
  const View& v = in.view;
  // Each of the op's gradients may need any of its sums; the prologue's need one each.
  const uint32_t own = (1u << info_of(kernel_of<Op>(Op::variant(attributes))).sums) - 1;
  uint32_t wanted = 0;
  for (int i = 0; i < kParams; ++i)
    if (out.params[i]) wanted |= i < Op::kParams ? own : 1u << (Op::kSums + i - Op::kParams);

  Call<Op> call(attributes, in, wanted != 0, aligned({in.x, in.residual, in.factor, dy, out.dx, out.dresidual, out.dfactor}), *this);
  const Partition& p = call.partition;
  Channelwise<Op>& args = call.args;
  args.dy = dy, args.dx = out.dx, args.dresidual = out.dresidual, args.dfactor = out.dfactor, args.wanted = wanted;

  // Gradients per (group, channel) go straight to the result if the parameter has a value for each, else to scratch memory, which
  // ReduceShared reduces.
  GradRef grads[kParams] = {};
  ReduceShared reduce{narrow(v.groups), narrow(v.channels), 0, {}};
  int64_t reduced = 0;
  for (int i = 0; i < kParams; ++i) {
    if (!out.params[i]) continue;
    const Param& param = in.params[i];
    if (param.numel() == v.groups * v.channels) {
      grads[i] = {out.params[i], param.is_double};
    } else {
      grads[i] = {allocate(v.groups * v.channels * 8), true};
      const auto [data, fallback, rows, count, run, is_double] = args.params[i];
      const auto* from = static_cast<const double*>(grads[i].data);
      reduce.item[reduce.items++] = {from, out.params[i], rows, count, run, narrow(reduced), is_double};
      reduced += param.numel();
    }
  }

  const int64_t compute_size = in.dtype == DType::kDouble ? 8 : 4;
  int64_t shared = 0;
  if (wanted) {
    if (p.plane) shared = kSums * (p.threads / 32) * compute_size;
    if (p.one_pass) std::copy(grads, grads + kParams, args.grads);
    else args.partial = allocate(v.groups * p.slots() * kSums * p.columns(v) * compute_size);
  }
  call.run("_backward", shared, *this);

  if (args.partial) {
    ReducePartials<Op> partials{args.partial, p.columns(v), narrow(v.channels), args.tiling.inner, p.plane ? 1u : narrow(p.repeat),
                                narrow(p.slots()), wanted, {}, {}, attributes};
    std::copy(args.params, args.params + kParams, partials.params);
    std::copy(grads, grads + kParams, partials.grads);
    // with few channels: many blocks of few channels each
    const int64_t lanes = std::min(std::clamp<int64_t>(power_of_two(ceil_div(v.channels, 256)), 4, 16), power_of_two(v.channels));
    const int64_t terms = narrow(p.slots() * partials.repeat * partials.inner);
    const int64_t rows = std::min(kReduceThreads / lanes, power_of_two(terms)), blocks = v.groups * ceil_div(v.channels, lanes);
    const std::string name = std::string("ctk_") + kName<Op> + "_reduce_partials" + (compute_size == 8 ? "_f64" : "_f32");
    cuda::launch(*this, name, blocks, static_cast<int>(lanes), static_cast<int>(rows), kSums * lanes * rows * 8, partials);
  }
  if (reduce.items) cuda::launch(*this, "ctk_reduce_shared", reduced, kSharedThreads, 1, kSharedThreads * 8, reduce);
}

#define CTK_OP(name, Op, ...)                                                        \
  template void Driver::forward<Op>(const Op::Attributes&, const Operands&, void*);         \
  template void Driver::backward<Op>(const Op::Attributes&, const Operands&, const void*, const Gradients&);
#include "../ops.def"

void Driver::gates_forward(bool is_double, const Gates& gates) {
  const char* name = is_double ? "ctk_gates_forward_f64" : "ctk_gates_forward_f32";
  cuda::launch(*this, name, ceil_div(gates.n, kGateThreads), kGateThreads, 1, 0, gates);
}
void Driver::gates_backward(bool is_double, const Gates& gates) {
  const char* name = is_double ? "ctk_gates_backward_f64" : "ctk_gates_backward_f32";
  cuda::launch(*this, name, ceil_div(gates.n, kGateThreads), kGateThreads, 1, 0, gates);
}

}  // namespace ctk::cuda
