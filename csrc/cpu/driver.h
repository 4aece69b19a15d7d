// Runs an op over a tensor on the CPU: partition, staging, threads, and sums in a fixed order.
#pragma once
#include "../driver.h"

namespace ctk::cpu {

// A backend of binding.h.
struct Driver {
  template <class Tensor>
  explicit Driver(const Tensor&) {}
  template <class Op>
  void forward(const typename Op::Attributes& attributes, const Operands& in, void* y);
  template <class Op>
  void backward(const typename Op::Attributes& attributes, const Operands& in, const void* dy, const Gradients& out);
  void gates_forward(bool is_double, const Gates& gates);
  void gates_backward(bool is_double, const Gates& gates);
};

}  // namespace ctk::cpu
