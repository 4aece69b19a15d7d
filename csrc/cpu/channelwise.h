// Runs a channelwise op over a tensor on the CPU: partition, staging, threads, and sums in a fixed order.
#pragma once
#include "../params.h"
#include "block.h"

namespace ctk::cpu {

struct Op {
  Kernel kernel;
  CtuStatic ctu;  // unused by the head edit
  int params() const { return kernel == Kernel::kHeadEdit ? int(kHeadEditParams) : int(kCtuParams); }
  bool has_prologue() const { return kernel != Kernel::kHeadEdit; }
};

struct Operands {
  DType dtype;
  View view;
  const void* x;
  const void* residual = nullptr;
  Param params[kMaxParams];
};

// y may be x.
void forward(const Op& op, const Operands& in, void* y);

// Null outputs are not computed. dx and dresidual may be null together (parameter gradients only). A parameter gradient
// has its parameter's shape and dtype.
struct Gradients {
  void* dx = nullptr;
  void* dresidual = nullptr;
  void* params[kMaxParams] = {};
};
void backward(const Op& op, const Operands& in, const void* dy, const Gradients& out);

}  // namespace ctk::cpu
