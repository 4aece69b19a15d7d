// A channelwise op is a struct that says everything about itself; ops.def lists them, and drivers, kernels, bindings and
// schemas are made from that list. What an op leaves out is a compile error:
//
//   enum Param {..., kParams}              parameters, a value per channel; kParameters has their names and fallbacks
//   kPrologue                              whether the op is applied to w = scale x + shift + residual instead of x
//   kFactor                                name of a tensor that the result is multiplied by; null: it is not. Absent from a
//                                          call, it is the second half of x's channels
//   kMemoryBound                           whether moving the tensors takes longer than the arithmetic
//   kParallelChannels                      how many channels' `precompute` is worth a thread
//   enum Constant {..., kConstants}        what `precompute` makes of a channel's parameters, once a call
//   enum Sum {..., kSums}                  what is summed over a channel; `parameter_gradients` makes gradients of it
//   Arithmetic<variant, T, Math>           `forward` and `gradients` of one value; k(i) reads constant i
//
// and, where a SimpleOp's do not do: Variant, Attributes, kInput, kFactor, kTable.
#pragma once
#include <array>
#include <optional>

#include "scalar.h"

namespace ctk {

struct Parameter {
  const char* name;
  std::optional<double> fallback = std::nullopt;  // the value of an absent one; none: the parameter is required
};

// What Arithmetic::gradients returns: the gradient of w, and the terms of the sums over the channel.
template <class T, int sums_>
struct Terms {
  static constexpr int kSums = sums_;
  T w, sums[sums_];
};

// An op with one variant of its arithmetic and no arguments beside tensors and the channel dimension.
struct SimpleOp {
  static constexpr const char* kInput = "x";  // name of the first tensor in the schema
  static constexpr const char* kFactor = nullptr;

  // Kernels are compiled for each variant.
  enum class Variant { kOnly };

  // Non-tensor arguments. `attributes` takes them in schema order.
  struct Attributes {};
  static constexpr std::array<const char*, 0> kAttributes{};
  static Attributes attributes() { return {}; }
  static Variant variant(const Attributes&) { return Variant::kOnly; }

  // Floats per channel that a kernel of its own computes for all blocks of a GPU, and whether a call needs them: see
  // cuda/ctu.cuh.
  static constexpr int kTable = 0;
  static bool needs_table(const Attributes&) { return false; }
};

}  // namespace ctk
