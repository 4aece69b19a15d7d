// What the CPU and the CUDA bindings share: tensors as the drivers see them.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "params.h"

namespace ctk {

// `rows` x `count` values, see Param. Keeps a contiguous copy alive where one is needed.
inline Param param_of(std::optional<torch::stable::Tensor>& t, double fallback) {
  using torch::headeronly::ScalarType;
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

inline View view_of_tensor(const torch::stable::Tensor& x, int64_t channel_dim, bool per_group) {
  return view_of(x.sizes().data(), x.strides().data(), x.dim(), channel_dim, per_group);
}

// What `result_like` and `conform` of ctkernels/ops/_layout.py are: compilers take every result to have those strides.
inline bool is_dense(const torch::stable::Tensor& x) {
  int order[64] = {}, used = 0;
  for (int64_t d = 0; d < x.dim(); ++d)
    if (x.size(d) == 0) return false;
  return memory_order(x.sizes().data(), x.strides().data(), x.dim(), order, used);
}

// An uninitialised result for `x`: with its strides where it is dense, contiguous where it is not, or empty.
inline torch::stable::Tensor result_like(const torch::stable::Tensor& x) {
  return is_dense(x) ? torch::stable::empty_like(x) : torch::stable::new_empty(x, x.sizes());
}

inline bool same_strides(const torch::stable::Tensor& t, const torch::stable::Tensor& x) {
  for (int64_t d = 0; d < x.dim(); ++d)
    if (t.stride(d) != x.stride(d) && x.size(d) != 1) return false;
  return true;
}

// A result that was computed like `x` or like a contiguous copy of it, with the strides that a result for `x` has.
inline torch::stable::Tensor conform(const torch::stable::Tensor& value, const torch::stable::Tensor& x) {
  if (!is_dense(x) || same_strides(value, x)) return value;
  torch::stable::Tensor out = torch::stable::empty_like(x);
  torch::stable::copy_(out, value);
  return out;
}

// A parameter's gradient.
inline torch::stable::Tensor contiguous_like(const torch::stable::Tensor& param) {
  return torch::stable::new_empty(param, param.sizes());
}

// `t` with the sizes, dtype and strides of `x`.
inline torch::stable::Tensor laid_out_like(const torch::stable::Tensor& t, const torch::stable::Tensor& x) {
  if (same_strides(t, x)) return t;
  torch::stable::Tensor copy = torch::stable::empty_like(x);
  torch::stable::copy_(copy, t);
  return copy;
}

}  // namespace ctk
