// The CPU implementations of the ops, on the LibTorch stable ABI. Schemas, checks and autograd live in Python
// (ctkernels/ops); here arguments are unpacked, results allocated, and the driver called.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

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

// `rows` x `count` values, see Param. Keeps a contiguous copy alive where one is needed.
Param param_of(std::optional<Tensor>& t, double fallback) {
  Param p;
  p.fallback = fallback;
  if (!t) return p;
  if (!t->is_contiguous()) t = torch::stable::contiguous(*t);
  const auto type = t->scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "ctkernels: parameters are float32 or float64");
  STD_TORCH_CHECK(t->dim() <= 2, "ctkernels: parameters have at most two dimensions");
  p.data = t->const_data_ptr();
  p.is_double = type == ScalarType::Double;
  p.groups = t->dim() == 2 ? t->size(0) : 1;
  p.count = t->dim() == 0 ? 1 : t->size(t->dim() - 1);
  return p;
}

View view_of_tensor(const Tensor& x, int64_t channel_dim, bool per_group) {
  return view_of(x.sizes().data(), x.strides().data(), x.dim(), channel_dim, per_group);
}

// `t` with the sizes, dtype and strides of `x`.
Tensor laid_out_like(const Tensor& t, const Tensor& x) {
  bool same = true;
  for (int64_t d = 0; d < x.dim(); ++d) same = same && (t.stride(d) == x.stride(d) || x.size(d) == 1);
  if (same) return t;
  Tensor copy = torch::stable::empty_like(x);
  torch::stable::copy_(copy, t);
  return copy;
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
  Tensor y = torch::stable::empty_like(a.x);
  forward(a.op, a.in, y.mutable_data_ptr());
  return y;
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
  const auto allocate = [&](const Tensor& like, void*& slot) {
    grads.push_back(torch::stable::empty_like(like));
    slot = grads.back().mutable_data_ptr();
  };
  if (need_x) allocate(a.x, out.dx);
  for (int i = 0; i < kCtuParams; ++i)
    if (needs >> (kNeedParams + i) & 1) allocate(*a.params[i], out.params[i]);
  if (need_residual) allocate(a.x, out.dresidual);
  backward(a.op, a.in, dy.const_data_ptr(), out);
  return grads;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ctkernels, CPU, m) {
  m.impl("ctu", TORCH_BOX(&ctu));
  m.impl("ctu_", TORCH_BOX(&ctu_));
  m.impl("ctu_backward", TORCH_BOX(&ctu_backward));
}
