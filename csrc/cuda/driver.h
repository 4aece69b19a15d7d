// Runs an op over a tensor on a GPU: which kernels, how many blocks, which arguments. Plain C++; it neither reads nor writes
// tensors.
#pragma once
#include "../driver.h"
#include "launch.h"

namespace ctk::cuda {

// A backend of binding.h, which provides memory that lives until the kernels in the stream are done with it, and the stream.
struct Driver {
  template <class Op>
  void forward(const typename Op::Attributes& attributes, const Operands& in, void* y);
  template <class Op>
  void backward(const typename Op::Attributes& attributes, const Operands& in, const void* dy, const Gradients& out);
  void gates_forward(bool is_double, const Gates& gates);
  void gates_backward(bool is_double, const Gates& gates);

  virtual void* allocate(int64_t bytes) = 0;
  virtual void launch(Launch launch) = 0;
  virtual ~Driver() = default;
};

}  // namespace ctk::cuda
