// The CUDA implementations of the ops, on the LibTorch stable ABI. Schemas, checks and autograd live in Python
// (ctkernels/ops); here arguments are unpacked, results allocated, and the launches made. Nothing here needs CUDA to load:
// kernels are started, and the current stream is asked for, through functions that whoever loads this library hands over.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../bind.h"
#include "channelwise.h"

#define CTK_EXPORT extern "C" __attribute__((visibility("default")))

// What starts kernels, and torch's `aoti_torch_get_current_cuda_stream`, which lives in a library that a CPU build of torch
// does not have, and that Python loads for itself alone: not even a weak reference would find it.
extern "C" {
__attribute__((visibility("default"))) ctk::cuda::Launcher ctk_cuda_launcher = nullptr;
__attribute__((visibility("default"))) int32_t (*ctk_cuda_current_stream)(int32_t device_index, void** stream) = nullptr;
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace ctk;
using namespace ctk::cuda;

// The device of a tensor, made current while this lives, and its current stream.
class TorchDevice final : public Device {
 public:
  explicit TorchDevice(const Tensor& x) : like_(x) {
    STD_TORCH_CHECK(ctk_cuda_launcher, "ctkernels: the library of CUDA kernels is not loaded");
    if (!x.is_cuda()) return;  // only under a launcher that records
    guard_ = std::make_unique<torch::stable::accelerator::DeviceGuard>(x.get_device_index());
    STD_TORCH_CHECK(ctk_cuda_current_stream, "ctkernels: torch's CUDA library is not loaded");
    TORCH_ERROR_CODE_CHECK(ctk_cuda_current_stream(x.get_device_index(), &stream_));
  }

  // The caching allocator keeps what is freed here for this stream, whose kernels come first.
  void* allocate(int64_t bytes) override {
    scratch_.push_back(torch::stable::new_empty(like_, {(bytes + 7) / 8}, ScalarType::Double));
    blocks_.push_back({scratch_.back().mutable_data_ptr(), bytes});
    return const_cast<void*>(blocks_.back().data);
  }

  void launch(Launch launch) override {
    launch.stream = stream_, launch.scratch = blocks_.data(), launch.scratch_count = static_cast<int32_t>(blocks_.size());
    const char* error = ctk_cuda_launcher(&launch);
    STD_TORCH_CHECK(!error, "ctkernels: ", launch.kernel, ": ", error);
  }

 private:
  Tensor like_;
  std::unique_ptr<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;
  std::vector<Tensor> scratch_;
  std::vector<Scratch> blocks_;
};

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat;
    case ScalarType::Double: return DType::kDouble;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kHalf;
    default: STD_TORCH_CHECK(false, "ctkernels: unsupported dtype");
  }
}

// The arguments of a channelwise op: x first, then parameters, then perhaps a residual.
struct Call {
  Tensor given, x;  // x: `given`, or a contiguous copy of it
  std::vector<std::optional<Tensor>> params;
  std::optional<Tensor> residual;
  Op op;
  Operands in;

  Call(Op op_, Tensor x_, std::vector<std::optional<Tensor>> params_, const double* fallback, std::optional<Tensor> residual_,
       int64_t channel_dim)
      : given(x_), x(std::move(x_)), params(std::move(params_)), residual(std::move(residual_)), op(op_) {
    bool shared = true, per_group = false;
    for (size_t i = 0; i < params.size(); ++i) {
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

  bool empty() const { return in.view.numel() == 0; }

  Tensor run_forward() {
    Tensor y = result_like(x);
    if (empty()) return y;
    TorchDevice device(x);
    forward(op, in, y.mutable_data_ptr(), device);
    return conform(y, given);
  }

  void run_forward_over() {
    if (empty()) return;
    TorchDevice device(x);
    forward(op, in, x.mutable_data_ptr(), device);
    if (x.data_ptr() != given.data_ptr()) torch::stable::copy_(given, x);
  }

  // `needs`: a bit per input in schema order, x, the parameters, the residual.
  std::vector<Tensor> run_backward(Tensor dy, int64_t needs) {
    std::vector<Tensor> grads;
    Gradients out;
    const auto wanted = [&](size_t bit) { return needs >> bit & 1; };
    const auto allocate = [&](Tensor grad, void*& slot) {
      grads.push_back(std::move(grad));
      slot = grads.back().mutable_data_ptr();
      if (empty()) torch::stable::zero_(grads.back());
    };
    if (wanted(0)) allocate(result_like(x), out.dx);
    for (size_t i = 0; i < params.size(); ++i)
      if (params[i] && wanted(1 + i)) allocate(contiguous_like(*params[i]), out.params[i]);
    const bool for_residual = residual && wanted(1 + params.size());
    if (for_residual) allocate(result_like(x), out.dresidual);
    if (empty() || grads.empty()) return grads;
    dy = laid_out_like(dy, x);
    TorchDevice device(x);
    backward(op, in, dy.const_data_ptr(), out, device);
    if (wanted(0)) grads.front() = conform(grads.front(), given);
    if (for_residual) grads.back() = conform(grads.back(), given);
    return grads;
  }
};

// ---- the CT unit ---------------------------------------------------------------------------------------------------

Call ctu_call(Tensor x, Tensor beta, Tensor coeff, std::optional<Tensor> slope, std::optional<Tensor> scale,
              std::optional<Tensor> shift, std::optional<Tensor> residual, int64_t channel_dim, int64_t kind, bool raw, double eps) {
  constexpr double fallback[kCtuParams] = {1.0, 0.5, 0.0, 1.0, 0.0};
  return Call(ctu_op({static_cast<CtuKind>(kind), raw, eps}), x, {beta, coeff, slope, scale, shift}, fallback, residual, channel_dim);
}

Tensor ctu(Tensor x, Tensor beta, Tensor coeff, std::optional<Tensor> slope, std::optional<Tensor> scale,
           std::optional<Tensor> shift, std::optional<Tensor> residual, int64_t channel_dim, int64_t kind, bool raw, double eps) {
  return ctu_call(x, beta, coeff, slope, scale, shift, residual, channel_dim, kind, raw, eps).run_forward();
}

void ctu_(Tensor x, Tensor beta, Tensor coeff, std::optional<Tensor> slope, std::optional<Tensor> scale,
          std::optional<Tensor> shift, std::optional<Tensor> residual, int64_t channel_dim, int64_t kind, bool raw, double eps) {
  ctu_call(x, beta, coeff, slope, scale, shift, residual, channel_dim, kind, raw, eps).run_forward_over();
}

std::vector<Tensor> ctu_backward(Tensor dy, Tensor x, Tensor beta, Tensor coeff, std::optional<Tensor> slope,
                                 std::optional<Tensor> scale, std::optional<Tensor> shift, std::optional<Tensor> residual,
                                 int64_t channel_dim, int64_t kind, bool raw, double eps, int64_t needs) {
  return ctu_call(x, beta, coeff, slope, scale, shift, residual, channel_dim, kind, raw, eps).run_backward(dy, needs);
}

// ---- the head edit -------------------------------------------------------------------------------------------------

Call head_edit_call(Tensor z, std::optional<Tensor> m, std::optional<Tensor> a, std::optional<Tensor> g_m,
                    std::optional<Tensor> g_a, int64_t channel_dim) {
  constexpr double fallback[kHeadEditParams] = {0.0, 0.0, 1.0, 1.0};
  return Call(head_edit_op(), z, {m, a, g_m, g_a}, fallback, std::nullopt, channel_dim);
}

Tensor head_edit(Tensor z, std::optional<Tensor> m, std::optional<Tensor> a, std::optional<Tensor> g_m,
                 std::optional<Tensor> g_a, int64_t channel_dim) {
  return head_edit_call(z, m, a, g_m, g_a, channel_dim).run_forward();
}

void head_edit_(Tensor z, std::optional<Tensor> m, std::optional<Tensor> a, std::optional<Tensor> g_m,
                std::optional<Tensor> g_a, int64_t channel_dim) {
  head_edit_call(z, m, a, g_m, g_a, channel_dim).run_forward_over();
}

std::vector<Tensor> head_edit_backward(Tensor dy, Tensor z, std::optional<Tensor> m, std::optional<Tensor> a,
                                       std::optional<Tensor> g_m, std::optional<Tensor> g_a, int64_t channel_dim,
                                       int64_t needs) {
  return head_edit_call(z, m, a, g_m, g_a, channel_dim).run_backward(dy, needs);
}

// ---- gates ---------------------------------------------------------------------------------------------------------

struct GateCall {
  Tensor log_alpha;
  std::optional<Tensor> noise;
  bool is_double;
  Gates args{};

  GateCall(Tensor log_alpha_, std::optional<Tensor> noise_, int64_t mode, double temperature, double low, double high)
      : log_alpha(torch::stable::contiguous(log_alpha_)), noise(noise_) {
    const auto type = log_alpha.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "ctkernels: gates are float32 or float64");
    is_double = type == ScalarType::Double;
    args.gate = {static_cast<GateMode>(mode), temperature, low, high};
    args.n = log_alpha.numel();
    args.log_alpha = log_alpha.const_data_ptr();
    if (!noise) return;
    args.seeded = noise->scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(args.seeded ? noise->numel() == 1 : noise->scalar_type() == type && noise->numel() == args.n,
                    "ctkernels: noise is an int64 seed, or has the dtype and the size of log_alpha");
    noise = torch::stable::contiguous(*noise);
    args.noise = noise->const_data_ptr();
  }
};

Tensor hard_concrete(Tensor log_alpha, std::optional<Tensor> noise, int64_t, int64_t mode, double temperature, double low,
                     double high) {
  GateCall call(log_alpha, noise, mode, temperature, low, high);
  Tensor g = result_like(call.log_alpha);
  if (call.args.n == 0) return g;
  call.args.value = g.mutable_data_ptr();
  TorchDevice device(call.log_alpha);
  gates_forward(call.is_double, call.args, device);
  return conform(g, log_alpha);
}

void hard_concrete_(Tensor log_alpha, std::optional<Tensor> noise, int64_t channel_dim, int64_t mode, double temperature,
                    double low, double high) {
  torch::stable::copy_(log_alpha, hard_concrete(log_alpha, noise, channel_dim, mode, temperature, low, high));
}

std::vector<Tensor> hard_concrete_backward(Tensor dy, Tensor log_alpha, std::optional<Tensor> noise, int64_t, int64_t mode,
                                           double temperature, double low, double high, int64_t needs) {
  GateCall call(log_alpha, noise, mode, temperature, low, high);
  dy = torch::stable::contiguous(dy);
  std::vector<Tensor> grads;
  void** const outputs[] = {&call.args.d_log_alpha, &call.args.d_noise};
  for (int input = 0; input < 2; ++input) {
    if (!(needs >> input & 1)) continue;
    grads.push_back(result_like(call.log_alpha));
    *outputs[input] = grads.back().mutable_data_ptr();
  }
  if (call.args.n == 0 || grads.empty()) return grads;
  call.args.dy = dy.const_data_ptr();
  TorchDevice device(call.log_alpha);
  gates_backward(call.is_double, call.args, device);
  for (Tensor& grad : grads) grad = conform(grad, log_alpha);
  return grads;
}

}  // namespace

// Makes these functions the kernels of the ops of library `name` for a dispatch key, for as long as the process lives.
CTK_EXPORT void ctk_cuda_register(const char* name, const char* key) {
  using torch::stable::detail::StableLibrary;
  auto* m = new StableLibrary(StableLibrary::Kind::IMPL, name, key, __FILE__, __LINE__);
  m->impl("ctu", TORCH_BOX(&ctu));
  m->impl("ctu_", TORCH_BOX(&ctu_));
  m->impl("ctu_backward", TORCH_BOX(&ctu_backward));
  m->impl("head_edit", TORCH_BOX(&head_edit));
  m->impl("head_edit_", TORCH_BOX(&head_edit_));
  m->impl("head_edit_backward", TORCH_BOX(&head_edit_backward));
  m->impl("hard_concrete", TORCH_BOX(&hard_concrete));
  m->impl("hard_concrete_", TORCH_BOX(&hard_concrete_));
  m->impl("hard_concrete_backward", TORCH_BOX(&hard_concrete_backward));
}
