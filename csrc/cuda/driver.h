// Runs an op over a tensor on a GPU: which kernels, how many blocks, which arguments. Plain C++: it launches through
// `Device`, and neither reads nor writes tensors.
#pragma once
#include "../driver.h"
#include "launch.h"

namespace ctk::cuda {

// What the binding provides: memory that lives until the kernels in the stream are done with it, and the stream.
struct Device {
  virtual void* allocate(int64_t bytes) = 0;
  virtual void launch(Launch launch) = 0;
  virtual ~Device() = default;
};

template <class Op>
void forward(const typename Op::Attributes& attributes, const Operands& in, void* y, Device& device);
template <class Op>
void backward(const typename Op::Attributes& attributes, const Operands& in, const void* dy, const Gradients& out, Device& device);

void gates_forward(bool is_double, const Gates& gates, Device& device);
void gates_backward(bool is_double, const Gates& gates, Device& device);

}  // namespace ctk::cuda
