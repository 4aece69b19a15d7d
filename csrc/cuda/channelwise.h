// Runs a channelwise op over a tensor on a GPU: which kernels, how many blocks, which arguments. Plain C++: it launches
// through `Device`, and neither reads nor writes tensors.
#pragma once
#include <memory>

#include "launch.h"
#include "plan.h"

namespace ctk::cuda {

enum class DType : int { kFloat, kDouble, kBFloat16, kHalf };

// What the binding provides: memory that lives until the kernels in the stream are done with it, and the stream.
struct Device {
  virtual void* allocate(int64_t bytes) = 0;
  virtual void launch(Launch launch) = 0;
  virtual ~Device() = default;
};

struct Op {
  const char* name;  // as in kernel names
  bool prologue;
  int params;
  CtuStatic ctu;  // unused by the head edit
};
Op ctu_op(CtuStatic ctu);
Op head_edit_op();

struct Operands {
  DType dtype;
  View view;
  const void* x;
  const void* residual = nullptr;
  Param params[kMaxParams];
};

// Null outputs are not computed. A parameter gradient has its parameter's shape and dtype.
struct Gradients {
  void* dx = nullptr;
  void* dresidual = nullptr;
  void* params[kMaxParams] = {};
};

// y may be x. The tensor must not be empty.
void forward(const Op& op, const Operands& in, void* y, Device& device);
void backward(const Op& op, const Operands& in, const void* dy, const Gradients& out, Device& device);

// ---- gates: all of them in one launch ------------------------------------------------------------------------------

void gates_forward(bool is_double, Gates args, Device& device);
void gates_backward(bool is_double, Gates args, Device& device);

}  // namespace ctk::cuda
