// The ops' implementations for torch, on the LibTorch stable ABI: they unpack arguments, allocate results and call a driver.
// Schemas, checks and autograd live in Python (ctkernels/ops). A backend is a class
//
//   Backend(tensor)                                               on that tensor's device
//   forward<Op>(attributes, operands, y)                          y may be operands.x
//   backward<Op>(attributes, operands, dy, gradients)
//   gates_forward(is_double, gates), gates_backward(is_double, gates)
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <string>
#include <tuple>
#include <vector>

#include "driver.h"

namespace ctk {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- tensors -------------------------------------------------------------------------------------------------------

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat;
    case ScalarType::Double: return DType::kDouble;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kHalf;
    default: STD_TORCH_CHECK(false, "ctkernels: unsupported dtype");
  }
}

// A number of the call: kernels take its value as an argument, wherever x is.
bool is_number(const Tensor& t) { return t.dim() == 0 && t.is_cpu(); }

// A parameter of the driver; replaces `t` by a contiguous copy if needed, which keeps that alive.
Param param_of(std::optional<Tensor>& t, double fallback, const Tensor& x) {
  Param p;
  p.fallback = fallback;
  if (!t) return p;
  STD_TORCH_CHECK(is_number(*t) || t->is_cpu() == x.is_cpu(), "ctkernels: parameters are where the first argument is, or 0-d on the CPU");
  if (!t->is_contiguous()) t = torch::stable::contiguous(*t);
  const auto type = t->scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "ctkernels: parameters are float32 or float64");
  STD_TORCH_CHECK(t->dim() <= 2, "ctkernels: parameters have at most two dimensions");
  p.data = t->const_data_ptr();
  p.is_double = type == ScalarType::Double;
  if (is_number(*t)) {
    p.fallback = p.is_double ? *static_cast<const double*>(p.data) : double(*static_cast<const float*>(p.data));
    p.data = nullptr, p.is_number = true;
  }
  p.groups = t->dim() == 2 ? t->size(0) : 1;
  p.count = t->dim() == 0 ? 1 : t->size(t->dim() - 1);
  return p;
}

bool is_dense(const Tensor& x) {
  int order[64] = {}, used = 0;
  if (x.numel() == 0) return false;
  return memory_order(x.sizes().data(), x.strides().data(), x.dim(), order, used);
}

// An uninitialised result for `x`: with its strides if `x` is dense, contiguous if it is not, or is empty. As in
// ctkernels/ops/layout.py: compilers rely on every result having those strides.
Tensor result_like(const Tensor& x) {
  return is_dense(x) ? torch::stable::empty_like(x) : torch::stable::new_empty(x, x.sizes());
}

bool same_strides(const Tensor& t, const Tensor& x) {
  for (int64_t d = 0; d < x.dim(); ++d)
    if (t.stride(d) != x.stride(d) && x.size(d) != 1) return false;
  return true;
}

// `t` with the sizes, dtype and strides of `x`, which is dense.
Tensor laid_out_like(const Tensor& t, const Tensor& x) {
  if (same_strides(t, x)) return t;
  Tensor copy = torch::stable::empty_like(x);
  torch::stable::copy_(copy, t);
  return copy;
}

// `value`, computed with the layout of `x` or of a contiguous copy of it, with the strides of result_like(x).
Tensor conform(const Tensor& value, const Tensor& x) { return is_dense(x) ? laid_out_like(value, x) : value; }

// ---- channelwise ops -----------------------------------------------------------------------------------------------

// The arguments of a call, in schema order.
class Arguments {
 public:
  Arguments(StableIValue* stack, uint64_t count, uint64_t results, uint64_t expected, uint64_t expected_results) : stack_(stack) {
    STD_TORCH_CHECK(count == expected && results == expected_results, "ctkernels: the schema has ", count, " arguments and ",
                    results, " results, the compiled kernel ", expected, " and ", expected_results, "; rebuild the extension");
  }
  template <class T>
  T next() { return torch::stable::detail::to<T>(*stack_++); }
  template <class Attributes, class... T>
  Attributes attributes(Attributes (*make)(T...)) {
    return std::apply(make, std::tuple<T...>{next<T>()...});  // braces: from left to right
  }

 private:
  StableIValue* stack_;
};

template <class Attributes, class... T>
constexpr int count_of(Attributes (*)(T...)) { return sizeof...(T); }

template <class Op, class... T>
std::string attribute_schema(typename Op::Attributes (*)(T...)) {
  static_assert(std::size(Op::kAttributes) == sizeof...(T), "kAttributes must name every argument of `attributes`");
  std::string text;
  size_t i = 0;
  [[maybe_unused]] const auto add = [&](const char* type) { text += std::string(", ") + type + " " + Op::kAttributes[i++]; };
  (add(std::is_same_v<T, bool> ? "bool" : std::is_same_v<T, double> ? "float" : "int"), ...);
  return text;
}

// The implementations of one op. Schema: x, parameters, residual (with a prologue) or factor (if the op has one), channel_dim,
// attributes.
template <class Backend, class Op>
class Channelwise {
 public:
  static std::string schema() {
    std::string text = std::string(kName<Op>) + "(Tensor " + Op::kInput;
    for (int i = 0; i < kParams; ++i)
      text += std::string(parameter_of<Op>(i).fallback ? ", Tensor? " : ", Tensor ") + parameter_of<Op>(i).name;
    if (Op::kPrologue) text += ", Tensor? residual";
    if (kHasFactor<Op>) text += std::string(", Tensor? ") + Op::kFactor;
    return text + ", int channel_dim" + attribute_schema<Op>(&Op::attributes) + ") -> Tensor";
  }

  static void forward(StableIValue* stack, uint64_t count, uint64_t results) {
    Arguments arguments(stack, count, results, kArguments, 1);
    Channelwise call(arguments);
    Tensor y = call.in_.view.packed ? torch::stable::new_empty(call.x_, call.like_.sizes()) : result_like(call.x_);
    if (!call.empty()) Backend(call.x_).template forward<Op>(call.attributes_, call.in_, y.mutable_data_ptr());
    stack[0] = torch::stable::detail::from(conform(y, call.like_));
  }

  static void forward_(StableIValue* stack, uint64_t count, uint64_t results) {
    Arguments arguments(stack, count, results, kArguments, 0);
    Channelwise call(arguments);
    STD_TORCH_CHECK(!call.in_.view.packed, "ctkernels: the result has half of the channels, and cannot be written over them");
    if (call.empty()) return;
    Backend(call.x_).template forward<Op>(call.attributes_, call.in_, call.x_.mutable_data_ptr());
    if (call.x_.data_ptr() != call.original_.data_ptr()) torch::stable::copy_(call.original_, call.x_);
  }

  // Takes dy first, and last a mask of the gradients to return: a bit per tensor argument, in schema order.
  static void backward(StableIValue* stack, uint64_t count, uint64_t results) {
    Arguments arguments(stack, count, results, kArguments + 2, 1);
    Tensor dy = arguments.next<Tensor>();
    Channelwise call(arguments);
    const int64_t mask = arguments.next<int64_t>();
    std::vector<Tensor> grads;
    Gradients out;
    const auto allocate = [&](Tensor grad, void*& slot) {
      grads.push_back(std::move(grad));
      slot = grads.back().mutable_data_ptr();
      if (call.empty()) torch::stable::zero_(grads.back());
    };
    if (mask & 1) allocate(result_like(call.x_), out.dx);
    for (int i = 0; i < kParams; ++i)
      if (call.params_[i] && mask >> (1 + i) & 1) {
        STD_TORCH_CHECK(call.params_[i]->is_cpu() == call.x_.is_cpu(), "ctkernels: a number has no gradient");
        allocate(torch::stable::new_empty(*call.params_[i], call.params_[i]->sizes()), out.params[i]);
      }
    if (call.residual_ && mask >> (1 + kParams) & 1) allocate(result_like(call.x_), out.dresidual);
    if (call.factor_ && mask >> (1 + kParams) & 1) allocate(result_like(call.x_), out.dfactor);
    if (call.in_.view.packed && out.dx) out.dfactor = static_cast<char*>(out.dx) + call.half();
    if (!call.empty() && !grads.empty()) {
      dy = call.in_.view.packed ? torch::stable::contiguous(dy) : laid_out_like(dy, call.x_);
      Backend(call.x_).template backward<Op>(call.attributes_, call.in_, dy.const_data_ptr(), out);
    }
    if (out.dx) grads.front() = conform(grads.front(), call.original_);
    if (call.factor_ ? out.dfactor : out.dresidual) grads.back() = conform(grads.back(), call.original_);
    stack[0] = torch::stable::detail::from(grads);
  }

 private:
  static constexpr int kParams = kParamsOf<Op>;
  static constexpr int kArguments = 1 + kParams + (Op::kPrologue || kHasFactor<Op> ? 1 : 0) + 1 + count_of(&Op::attributes);
  static_assert(!(Op::kPrologue && kHasFactor<Op>), "an op has a residual or a factor");

  Tensor original_, x_, like_;  // x_: the original, or a contiguous copy; like_: has the result's sizes, dtype and strides
  std::optional<Tensor> params_[kParams], residual_, factor_;
  typename Op::Attributes attributes_;
  Operands in_;

  explicit Channelwise(Arguments& arguments) : original_(arguments.next<Tensor>()), x_(original_), like_(original_) {
    bool shared = true, per_group = false;
    for (int i = 0; i < kParams; ++i) {
      const std::optional<double> fallback = parameter_of<Op>(i).fallback;
      params_[i] = fallback ? arguments.next<std::optional<Tensor>>() : arguments.next<Tensor>();
      in_.params[i] = param_of(params_[i], fallback.value_or(0.0), x_);
      shared = shared && in_.params[i].count == 1;
      per_group = per_group || in_.params[i].groups > 1;
    }
    if constexpr (Op::kPrologue) residual_ = arguments.next<std::optional<Tensor>>();
    if constexpr (kHasFactor<Op>) factor_ = arguments.next<std::optional<Tensor>>();
    int64_t channel_dim = arguments.next<int64_t>();
    attributes_ = arguments.attributes(&Op::attributes);
    in_.dtype = dtype_of(x_);
    if (kHasFactor<Op> && !factor_) {
      pack(channel_dim, shared, per_group);
      return;
    }
    if (shared) channel_dim = -1;
    const auto view = [&] { return view_of(x_.sizes().data(), x_.strides().data(), x_.dim(), channel_dim, per_group); };
    in_.view = view();
    if (!in_.view.dense) x_ = torch::stable::contiguous(x_), in_.view = view();
    in_.x = x_.const_data_ptr();
    if (factor_) {
      factor_ = laid_out_like(*factor_, x_);
      in_.factor = factor_->const_data_ptr();
    }
    if (residual_) {
      residual_ = laid_out_like(*residual_, x_);
      in_.residual = residual_->const_data_ptr();
    }
  }

  // Without a factor argument: the factor is the second half of x's channels.
  void pack(int64_t channel_dim, bool shared, bool per_group) {
    STD_TORCH_CHECK(channel_dim >= 0 && x_.size(channel_dim) % 2 == 0, "ctkernels: a packed tensor has an even number of channels");
    x_ = torch::stable::contiguous(x_);
    in_.view = packed_view_of(x_.sizes().data(), x_.strides().data(), x_.dim(), channel_dim, shared, per_group);
    like_ = torch::stable::narrow(like_, channel_dim, 0, original_.size(channel_dim) / 2);
    in_.x = x_.const_data_ptr();
    in_.factor = static_cast<const char*>(in_.x) + half();
  }
  // Bytes from x to the factor behind it.
  int64_t half() const { return in_.view.channels * in_.view.inner * size_of(in_.dtype); }

  bool empty() const { return in_.view.numel() == 0; }
};

// ---- gates ---------------------------------------------------------------------------------------------------------

struct GateCall {
  Tensor log_alpha;
  std::optional<Tensor> noise;
  bool is_double;
  Gates gates{};

  GateCall(const Tensor& log_alpha_, std::optional<Tensor> noise_, int64_t mode, double temperature, double low, double high)
      : log_alpha(torch::stable::contiguous(log_alpha_)), noise(std::move(noise_)) {
    const auto type = log_alpha.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "ctkernels: gates are float32 or float64");
    is_double = type == ScalarType::Double;
    gates.gate = {static_cast<GateMode>(mode), temperature, low, high};
    gates.n = log_alpha.numel();
    gates.log_alpha = log_alpha.const_data_ptr();
    if (!noise) return;
    gates.seeded = noise->scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(gates.seeded ? noise->numel() == 1 : noise->scalar_type() == type && noise->numel() == gates.n,
                    "ctkernels: noise is an int64 seed, or has the dtype and the size of log_alpha");
    noise = torch::stable::contiguous(*noise);
    gates.noise = noise->const_data_ptr();
  }
};

template <class Backend>
Tensor hard_concrete(Tensor log_alpha, std::optional<Tensor> noise, int64_t, int64_t mode, double temperature, double low,
                     double high) {
  GateCall call(log_alpha, noise, mode, temperature, low, high);
  Tensor g = result_like(call.log_alpha);
  call.gates.value = g.mutable_data_ptr();
  if (call.gates.n) Backend(call.log_alpha).gates_forward(call.is_double, call.gates);
  return conform(g, log_alpha);
}

template <class Backend>
std::vector<Tensor> hard_concrete_backward(Tensor dy, Tensor log_alpha, std::optional<Tensor> noise, int64_t, int64_t mode,
                                           double temperature, double low, double high, int64_t mask) {
  GateCall call(log_alpha, noise, mode, temperature, low, high);
  dy = torch::stable::contiguous(dy);
  call.gates.dy = dy.const_data_ptr();
  std::vector<Tensor> grads;
  void** const outputs[] = {&call.gates.d_log_alpha, &call.gates.d_noise};
  for (int input = 0; input < 2; ++input) {
    if (!(mask >> input & 1)) continue;
    grads.push_back(result_like(call.log_alpha));
    *outputs[input] = grads.back().mutable_data_ptr();
  }
  if (call.gates.n && !grads.empty()) Backend(call.log_alpha).gates_backward(call.is_double, call.gates);
  for (Tensor& grad : grads) grad = conform(grad, log_alpha);
  return grads;
}

template <class Backend>
void add_to(torch::stable::detail::StableLibrary& m) {
#define CTK_OP(name, Op, ...)                          \
  m.impl(#name, &Channelwise<Backend, Op>::forward);   \
  m.impl(#name "_", &Channelwise<Backend, Op>::forward_); \
  m.impl(#name "_backward", &Channelwise<Backend, Op>::backward);
#include "ops.def"
  m.impl("hard_concrete", TORCH_BOX(&hard_concrete<Backend>));
  m.impl("hard_concrete_backward", TORCH_BOX(&hard_concrete_backward<Backend>));
}

}  // namespace
}  // namespace ctk
