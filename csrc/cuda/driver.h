// Runs an op over a tensor on a GPU: chooses kernels, grids and arguments. Plain C++ that neither reads nor writes tensors.
#pragma once
#include "../driver.h"
#include "launch.h"

namespace ctk::cuda {

// A backend of binding.h. A derived class provides the stream, and memory that lives until the kernels on it are done.
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
