// The CUDA implementations of the ops. Nothing here needs CUDA to load: kernels are started, and the current stream is asked for,
// through functions that whoever loads this library hands over.
#include <torch/csrc/stable/accelerator.h>

#include <memory>

#include "../binding.h"
#include "driver.h"

// What starts kernels, and torch's `aoti_torch_get_current_cuda_stream`, which lives in a library that a CPU build of torch
// does not have, and that Python loads for itself alone: not even a weak reference would find it.
extern "C" {
__attribute__((visibility("default"))) ctk::cuda::Launcher ctk_cuda_launcher = nullptr;
__attribute__((visibility("default"))) int32_t (*ctk_cuda_current_stream)(int32_t device_index, void** stream) = nullptr;
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace ctk::cuda;

// The device of a tensor, made current while this lives, and its current stream.
class TorchDriver final : public Driver {
 public:
  explicit TorchDriver(const Tensor& x) : like_(x) {
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

}  // namespace

// Makes these functions the kernels of the ops of library `name` for a dispatch key, for as long as the process lives.
CTK_EXPORT void ctk_cuda_register(const char* name, const char* key) {
  using torch::stable::detail::StableLibrary;
  ctk::add_to<TorchDriver>(*new StableLibrary(StableLibrary::Kind::IMPL, name, key, __FILE__, __LINE__));
}
