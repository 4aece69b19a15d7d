// The CPU implementations of the ops, on the LibTorch stable ABI. Schemas, checks and autograd live in Python
// (ctkernels/ops); here arguments are unpacked, results allocated, and the driver called.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "../bind.h"
#include "../hard_concrete.h"
#include "channelwise.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace ctk;
using namespace ctk::cpu;

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat;
    case ScalarType::Double: return DType::kDouble;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kHalf;
    default: STD_TORCH_CHECK(false, "ctkernels: unsupported dtype");
  }
}

struct CtuArgs {
  Tensor x;
  std::optional<Tensor> params[kCtuParams], residual;
  Op op;
  Operands in;

  CtuArgs(Tensor x_, Tensor beta, Tensor coeff, std::optional<Tensor> slope, std::optional<Tensor> scale,
          std::optional<Tensor> shift, std::optional<Tensor> residual_, int64_t channel_dim, int64_t kind, bool raw, double eps)
      : x(std::move(x_)), params{beta, coeff, slope, scale, shift}, residual(std::move(residual_)) {
    op = {static_cast<Kernel>(kind), {static_cast<CtuKind>(kind), raw, eps}};
    const double fallback[kCtuParams] = {1.0, 0.5, 0.0, 1.0, 0.0};
    bool shared = true, per_group = false;
    for (int i = 0; i < kCtuParams; ++i) {
      in.params[i] = param_of(params[i], fallback[i]);
      shared = shared && in.params[i].count == 1;
      per_group = per_group || in.params[i].groups > 1;
    }
    in.dtype = dtype_of(x);
    if (shared) channel_dim = -1;
    in.view = view_of_tensor(x, channel_dim, per_group);
    if (!in.view.dense) {
      x = torch::stable::contiguous(x);
      in.view = view_of_tensor(x, channel_dim, per_group);
    }
    in.x = x.const_data_ptr();
    if (residual) {
      residual = laid_out_like(*residual, x);
      in.residual = residual->const_data_ptr();
    }
  }
};

Tensor ctu(Tensor x, Tensor beta, Tensor coeff, std::optional<Tensor> slope, std::optional<Tensor> scale,
           std::optional<Tensor> shift, std::optional<Tensor> residual, int64_t channel_dim, int64_t kind, bool raw, double eps) {
  CtuArgs a(x, beta, coeff, slope, scale, shift, residual, channel_dim, kind, raw, eps);
  Tensor y = result_like(a.x);
  forward(a.op, a.in, y.mutable_data_ptr());
  return conform(y, x);
}

void ctu_(Tensor x, Tensor beta, Tensor coeff, std::optional<Tensor> slope, std::optional<Tensor> scale,
          std::optional<Tensor> shift, std::optional<Tensor> residual, int64_t channel_dim, int64_t kind, bool raw, double eps) {
  CtuArgs a(x, beta, coeff, slope, scale, shift, residual, channel_dim, kind, raw, eps);
  forward(a.op, a.in, a.x.mutable_data_ptr());
  if (a.x.data_ptr() != x.data_ptr()) torch::stable::copy_(x, a.x);
}

// Bits of `needs`, in schema order.
enum CtuNeeds : int { kNeedX = 0, kNeedParams = 1, kNeedResidual = 1 + kCtuParams };

std::vector<Tensor> ctu_backward(Tensor dy, Tensor x, Tensor beta, Tensor coeff, std::optional<Tensor> slope,
                                 std::optional<Tensor> scale, std::optional<Tensor> shift, std::optional<Tensor> residual,
                                 int64_t channel_dim, int64_t kind, bool raw, double eps, int64_t needs) {
  CtuArgs a(x, beta, coeff, slope, scale, shift, residual, channel_dim, kind, raw, eps);
  dy = laid_out_like(dy, a.x);
  const bool need_x = needs >> kNeedX & 1, need_residual = needs >> kNeedResidual & 1;
  std::vector<Tensor> grads;
  Gradients out;
  const auto allocate = [&](Tensor grad, void*& slot) {
    grads.push_back(std::move(grad));
    slot = grads.back().mutable_data_ptr();
  };
  if (need_x) allocate(result_like(a.x), out.dx);
  for (int i = 0; i < kCtuParams; ++i)
    if (needs >> (kNeedParams + i) & 1) allocate(contiguous_like(*a.params[i]), out.params[i]);
  if (need_residual) allocate(result_like(a.x), out.dresidual);
  backward(a.op, a.in, dy.const_data_ptr(), out);
  if (need_x) grads.front() = conform(grads.front(), x);
  if (need_residual) grads.back() = conform(grads.back(), x);
  return grads;
}

// ---- head edit -----------------------------------------------------------------------------------------------------

struct HeadEditArgs {
  Tensor z;
  std::optional<Tensor> params[kHeadEditParams];
  Op op{Kernel::kHeadEdit, {}};
  Operands in;

  HeadEditArgs(Tensor z_, std::optional<Tensor> m, std::optional<Tensor> a, std::optional<Tensor> g_m,
               std::optional<Tensor> g_a, int64_t channel_dim)
      : z(std::move(z_)), params{m, a, g_m, g_a} {
    const double fallback[kHeadEditParams] = {0.0, 0.0, 1.0, 1.0};
    bool per_group = false;
    for (int i = 0; i < kHeadEditParams; ++i) {
      in.params[i] = param_of(params[i], fallback[i]);
      per_group = per_group || in.params[i].groups > 1;
    }
    in.dtype = dtype_of(z);
    in.view = view_of_tensor(z, channel_dim, per_group);
    if (!in.view.dense) {
      z = torch::stable::contiguous(z);
      in.view = view_of_tensor(z, channel_dim, per_group);
    }
    in.x = z.const_data_ptr();
  }
};

Tensor head_edit(Tensor z, std::optional<Tensor> m, std::optional<Tensor> a, std::optional<Tensor> g_m,
                 std::optional<Tensor> g_a, int64_t channel_dim) {
  HeadEditArgs args(z, m, a, g_m, g_a, channel_dim);
  Tensor y = result_like(args.z);
  forward(args.op, args.in, y.mutable_data_ptr());
  return conform(y, z);
}

void head_edit_(Tensor z, std::optional<Tensor> m, std::optional<Tensor> a, std::optional<Tensor> g_m,
                std::optional<Tensor> g_a, int64_t channel_dim) {
  HeadEditArgs args(z, m, a, g_m, g_a, channel_dim);
  forward(args.op, args.in, args.z.mutable_data_ptr());
  if (args.z.data_ptr() != z.data_ptr()) torch::stable::copy_(z, args.z);
}

std::vector<Tensor> head_edit_backward(Tensor dy, Tensor z, std::optional<Tensor> m, std::optional<Tensor> a,
                                       std::optional<Tensor> g_m, std::optional<Tensor> g_a, int64_t channel_dim,
                                       int64_t needs) {
  HeadEditArgs args(z, m, a, g_m, g_a, channel_dim);
  dy = laid_out_like(dy, args.z);
  std::vector<Tensor> grads;
  Gradients out;
  const auto allocate = [&](Tensor grad, void*& slot) {
    grads.push_back(std::move(grad));
    slot = grads.back().mutable_data_ptr();
  };
  if (needs & 1) allocate(result_like(args.z), out.dx);
  for (int i = 0; i < kHeadEditParams; ++i)
    if (needs >> (1 + i) & 1) allocate(contiguous_like(*args.params[i]), out.params[i]);
  backward(args.op, args.in, dy.const_data_ptr(), out);
  if (needs & 1) grads.front() = conform(grads.front(), z);
  return grads;
}

// ---- gates ---------------------------------------------------------------------------------------------------------

// Calls f(i) for i in [0, n), on several threads where that pays.
template <class F>
void for_gates(int64_t n, const F& f) {
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  };
  if (n < 4096) range(0, n);
  else torch::stable::parallel_for(0, n, 1024, range);
}

// Reads or writes element i of a contiguous float or double tensor.
struct Reals {
  void* data;
  bool wide;
  explicit Reals(const Tensor& t) : data(t.data_ptr()), wide(t.scalar_type() == ScalarType::Double) {}
  double get(int64_t i) const { return wide ? static_cast<double*>(data)[i] : double(static_cast<float*>(data)[i]); }
  void set(int64_t i, double v) const {
    if (wide) static_cast<double*>(data)[i] = v;
    else static_cast<float*>(data)[i] = static_cast<float>(v);
  }
};

struct GateArgs {
  Tensor log_alpha, noise;
  Gate gate;
  GateArgs(Tensor log_alpha_, std::optional<Tensor> noise_, int64_t mode, double temperature, double low, double high)
      : log_alpha(torch::stable::contiguous(log_alpha_)),
        noise(noise_ ? torch::stable::contiguous(*noise_) : log_alpha),
        gate{static_cast<GateMode>(mode), temperature, low, high} {
    const auto type = log_alpha.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "ctkernels: gates are float32 or float64");
    STD_TORCH_CHECK(noise.scalar_type() == type, "ctkernels: noise has the dtype of log_alpha");
  }
  GateValue at(int64_t i) const { return evaluate(gate, Reals(log_alpha).get(i), Reals(noise).get(i)); }
};

Tensor hard_concrete(Tensor log_alpha, std::optional<Tensor> noise, int64_t, int64_t mode, double temperature, double low,
                     double high) {
  GateArgs a(log_alpha, noise, mode, temperature, low, high);
  Tensor g = result_like(a.log_alpha);
  const Reals out(g);
  for_gates(a.log_alpha.numel(), [&](int64_t i) { out.set(i, a.at(i).value); });
  return conform(g, log_alpha);
}

void hard_concrete_(Tensor log_alpha, std::optional<Tensor> noise, int64_t channel_dim, int64_t mode, double temperature,
                    double low, double high) {
  torch::stable::copy_(log_alpha, hard_concrete(log_alpha, noise, channel_dim, mode, temperature, low, high));
}

std::vector<Tensor> hard_concrete_backward(Tensor dy, Tensor log_alpha, std::optional<Tensor> noise, int64_t, int64_t mode,
                                           double temperature, double low, double high, int64_t needs) {
  GateArgs a(log_alpha, noise, mode, temperature, low, high);
  dy = torch::stable::contiguous(dy);
  const Reals upstream(dy);
  std::vector<Tensor> grads;
  for (int input = 0; input < 2; ++input) {
    if (!(needs >> input & 1)) continue;
    Tensor grad = result_like(a.log_alpha);
    const Reals out(grad);
    for_gates(a.log_alpha.numel(), [&](int64_t i) {
      const GateValue v = a.at(i);
      out.set(i, upstream.get(i) * (input == 0 ? v.slope : v.noise_slope));
    });
    grads.push_back(conform(grad, log_alpha));
  }
  return grads;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ctkernels, CPU, m) {
  m.impl("ctu", TORCH_BOX(&ctu));
  m.impl("ctu_", TORCH_BOX(&ctu_));
  m.impl("ctu_backward", TORCH_BOX(&ctu_backward));
  m.impl("head_edit", TORCH_BOX(&head_edit));
  m.impl("head_edit_", TORCH_BOX(&head_edit_));
  m.impl("head_edit_backward", TORCH_BOX(&head_edit_backward));
  m.impl("hard_concrete", TORCH_BOX(&hard_concrete));
  m.impl("hard_concrete_", TORCH_BOX(&hard_concrete_));
  m.impl("hard_concrete_backward", TORCH_BOX(&hard_concrete_backward));
}
