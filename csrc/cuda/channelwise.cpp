#include "channelwise.h"

#include <cstdio>
#include <stdexcept>
#include <string>

namespace ctk::cuda {
namespace {

const char* type_name(DType t) {
  switch (t) {
    case DType::kFloat: return "f32";
    case DType::kDouble: return "f64";
    case DType::kBFloat16: return "bf16";
    default: return "f16";
  }
}
int64_t size_of(DType t) { return t == DType::kDouble ? 8 : t == DType::kFloat ? 4 : 2; }

// Shared memory comes in whole 16 bytes: ptxas may read neighbouring values together, up to there.
template <class Args>
void launch(Device& device, const std::string& kernel, int64_t grid, int block_x, int block_y, int64_t shared, const Args& args) {
  if (grid > 0x7fffffff) throw std::runtime_error("ctkernels: a tensor too large for one launch (" + kernel + ")");
  device.launch({kernel.c_str(), static_cast<uint32_t>(grid), static_cast<uint32_t>(block_x), static_cast<uint32_t>(block_y),
                 static_cast<uint32_t>(ceil_div(shared, 16) * 16), &args, sizeof(args), nullptr, nullptr, 0});
}

bool aligned(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers)
    if (reinterpret_cast<uintptr_t>(p) % 16) return false;
  return true;
}

uint32_t narrow(int64_t v) {
  if (v < 0 || v > 0xffffffffll) throw std::runtime_error("ctkernels: a tensor too large to be cut into blocks");
  return static_cast<uint32_t>(v);
}

ParamRef reference(const Param& p, int64_t channels) {
  const bool spread = p.count > 1;
  return {p.data, p.fallback, narrow(p.groups), narrow(p.count), narrow(spread ? channels / p.count : channels), p.is_double};
}

// A gradient that a kernel can write in place has a value per group and channel.
bool whole(const Param& p, const View& v) { return p.numel() == v.groups * v.channels; }

Tiling tiling_of(const Plan& p, const View& v) {
  return {p.group, p.row, p.width, p.cols_per, narrow(p.rows), narrow(p.rows_per), narrow(p.row_cuts), narrow(p.col_cuts),
          narrow(v.channels), p.plane ? 1u : narrow(v.inner)};
}

struct Call {
  Plan plan;
  Channelwise args{};
  std::string suffix;  // of the kernel's name

  Call(const Op& op, const Operands& in, bool sums, bool is_aligned, bool lean)
      : plan(plan_for(in.view, size_of(in.dtype), sums, is_aligned && !(in.dtype == DType::kDouble && op.prologue))) {
    args.tiling = tiling_of(plan, in.view);
    args.x = in.x, args.residual = in.residual, args.ctu = op.ctu;
    for (int i = 0; i < op.params; ++i) args.params[i] = reference(in.params[i], in.view.channels);
    suffix = std::string("_") + type_name(in.dtype) + (plan.plane ? "_plane" : "_lanes") + (!plan.wide ? "_one" : lean ? "_lean" : "_wide");
  }
};

// Has the knobs made from logits once for all blocks.
void make_knobs(const Op& op, const Operands& in, Channelwise& args, Device& device) {
  if (!op.prologue || !op.ctu.raw || in.dtype == DType::kDouble) return;
  const Param &beta = in.params[kBeta], &coeff = in.params[kCoeff];
  const int64_t rows = beta.groups > 1 || coeff.groups > 1 ? in.view.groups : 1, count = narrow(rows * in.view.channels);
  auto* to = static_cast<float*>(device.allocate(kKnobFields * count * sizeof(float)));
  args.knobs = to, args.knob_rows = narrow(rows);
  const Knobs knobs{to, narrow(rows), narrow(in.view.channels), op.ctu, args.params[kBeta], args.params[kCoeff]};
  launch(device, "ctk_ctu_knobs", ceil_div(count, kKnobThreads), kKnobThreads, 1, 0, knobs);
}

// Only the unit that networks are full of has kernels without a prologue.
bool is_lean(const Op& op, const Operands& in) {
  return op.prologue && op.ctu.kind == CtuKind::kLogistic && !in.residual && !in.params[kScaleParam].data && !in.params[kShiftParam].data;
}

int64_t power_of_two(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

}  // namespace

Op ctu_op(CtuStatic ctu) {
  static const char* const names[] = {"logistic", "leaky", "relu6", "gaussian"};
  return {names[static_cast<int>(ctu.kind)], true, kCtuParams, ctu};
}

Op head_edit_op() { return {"head_edit", false, kHeadEditParams, {}}; }

void forward(const Op& op, const Operands& in, void* y, Device& device) {
  Call call(op, in, false, aligned({in.x, in.residual, y}), is_lean(op, in));
  call.args.y = y;
  make_knobs(op, in, call.args, device);
  launch(device, "ctk_" + std::string(op.name) + "_forward" + call.suffix, call.plan.programs, call.plan.threads, 1, 0, call.args);
}

void backward(const Op& op, const Operands& in, const void* dy, const Gradients& out, Device& device) {
  const View& v = in.view;
  uint32_t wanted = 0;
  for (int i = 0; i < op.params; ++i) {
    if (!out.params[i]) continue;
    if (!op.prologue || i < kSlopeParam) wanted |= kOwnSums;
    else wanted |= i == kSlopeParam ? kOwnSums : 1u << (i == kScaleParam ? kCtuScaleSum : kCtuShiftSum);
  }
  // Sums that the op has: the slope's is the leaky unit's only.
  if (!op.prologue) wanted &= 3u;
  else if (op.ctu.kind != CtuKind::kLeaky) wanted &= ~(1u << kCtuSlopeSum);

  Call call(op, in, wanted != 0, aligned({in.x, in.residual, dy, out.dx, out.dresidual}), is_lean(op, in));
  const Plan& plan = call.plan;
  Channelwise& args = call.args;
  args.dy = dy, args.dx = out.dx, args.dresidual = out.dresidual, args.wanted = wanted;

  // Where the gradients per (group, channel) go: to the result, or to scratch memory that `collect` adds up.
  GradRef grads[kMaxParams] = {};
  Collect collect{narrow(v.groups), narrow(v.channels), 0, {}};
  int64_t collected = 0;
  for (int i = 0; i < op.params; ++i) {
    if (!out.params[i]) continue;
    const Param& p = in.params[i];
    if (whole(p, v)) {
      grads[i] = {out.params[i], p.is_double};
    } else {
      grads[i] = {device.allocate(v.groups * v.channels * 8), true};
      const ParamRef r = reference(p, v.channels);
      collect.item[collect.items++] = {static_cast<const double*>(grads[i].data), out.params[i], r.rows, r.count, r.run, narrow(collected), p.is_double};
      collected += p.numel();
    }
  }

  const int64_t compute_size = in.dtype == DType::kDouble ? 8 : 4;
  int64_t shared = 0;
  if (wanted) {
    if (plan.plane) shared = kSumSlots * (plan.threads / 32) * compute_size;
    if (plan.direct) std::copy(grads, grads + kMaxParams, args.grads);
    else args.partial = device.allocate(v.groups * plan.slots() * kSumSlots * plan.columns(v) * compute_size);
  }
  make_knobs(op, in, args, device);
  launch(device, "ctk_" + std::string(op.name) + "_backward" + call.suffix, plan.programs, plan.threads, 1, shared, args);

  if (args.partial) {
    Finish finish{args.partial, plan.columns(v), narrow(v.channels), plan.plane ? 1u : narrow(v.inner), plan.plane ? 1u : narrow(plan.repeat),
                  narrow(plan.slots()), wanted, op.ctu, {}, {}};
    std::copy(args.params, args.params + kMaxParams, finish.params);
    std::copy(grads, grads + kMaxParams, finish.grads);
    // of few channels, many blocks with few each
    const int64_t lanes = std::min(std::clamp<int64_t>(power_of_two(ceil_div(v.channels, 256)), 4, 16), power_of_two(v.channels));
    const int64_t terms = narrow(plan.slots() * finish.repeat * finish.inner);
    const int64_t rows = std::min(kFinishThreads / lanes, power_of_two(terms));
    const std::string name = std::string("ctk_") + (op.prologue ? "ctu" : op.name) + "_finish_" + (compute_size == 8 ? "f64" : "f32");
    launch(device, name, v.groups * ceil_div(v.channels, lanes), static_cast<int>(lanes), static_cast<int>(rows), lanes * rows * 8, finish);
  }
  if (collect.items) launch(device, "ctk_collect", collected, kCollectThreads, 1, kCollectThreads * 8, collect);
}

void gates_forward(bool is_double, Gates args, Device& device) {
  launch(device, is_double ? "ctk_gates_forward_f64" : "ctk_gates_forward_f32", ceil_div(args.n, kGateThreads), kGateThreads, 1, 0, args);
}
void gates_backward(bool is_double, Gates args, Device& device) {
  launch(device, is_double ? "ctk_gates_backward_f64" : "ctk_gates_backward_f32", ceil_div(args.n, kGateThreads), kGateThreads, 1, 0, args);
}

}  // namespace ctk::cuda
