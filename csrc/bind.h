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

// `t` with the sizes, dtype and strides of `x`.
inline torch::stable::Tensor laid_out_like(const torch::stable::Tensor& t, const torch::stable::Tensor& x) {
  bool same = true;
  for (int64_t d = 0; d < x.dim(); ++d) same = same && (t.stride(d) == x.stride(d) || x.size(d) == 1);
  if (same) return t;
  torch::stable::Tensor copy = torch::stable::empty_like(x);
  torch::stable::copy_(copy, t);
  return copy;
}

}  // namespace ctk
