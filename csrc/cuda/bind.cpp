// The CUDA implementations of the ops. This library loads without CUDA: whoever loads it supplies the functions that launch
// kernels and return the current stream.
#include <torch/csrc/stable/accelerator.h>

#include <memory>

#include "../binding.h"
#include "driver.h"

// `ctk_cuda_launch`, and torch's `aoti_torch_get_current_cuda_stream`. The latter is in a library that a CPU build of torch does
// not have, and that Python loads privately: not even a weak reference would find it.
extern "C" {
__attribute__((visibility("default"))) ctk::cuda::Launcher ctk_cuda_launcher = nullptr;
__attribute__((visibility("default"))) int32_t (*ctk_cuda_current_stream)(int32_t device_index, void** stream) = nullptr;
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace ctk::cuda;

// Makes the device of a tensor current while it lives, and launches on its current stream.
class TorchDriver final : public Driver {
 public:
  explicit TorchDriver(const Tensor& x) : like_(x) {
    STD_TORCH_CHECK(ctk_cuda_launcher, "ctkernels: the library of CUDA kernels is not loaded");
    if (!x.is_cuda()) return;  // only under a recording launcher
    guard_ = std::make_unique<torch::stable::accelerator::DeviceGuard>(x.get_device_index());
    STD_TORCH_CHECK(ctk_cuda_current_stream, "ctkernels: torch's CUDA library is not loaded");
    TORCH_ERROR_CODE_CHECK(ctk_cuda_current_stream(x.get_device_index(), &stream_));
  }

  // Freed after the launches: the caching allocator reuses the memory only on this stream, after these kernels.
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

// Registers the kernels for the ops of library `name` under a dispatch key, for the life of the process.
CTK_EXPORT void ctk_cuda_register(const char* name, const char* key) {
  using torch::stable::detail::StableLibrary;
  ctk::add_to<TorchDriver>(*new StableLibrary(StableLibrary::Kind::IMPL, name, key, __FILE__, __LINE__));
}
