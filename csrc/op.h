// A channelwise op is a struct that describes itself completely; ops.def lists the ops, and drivers, kernels, bindings and
// schemas are generated from that list. A missing member is a compile error:
//
//   enum Param {..., kParams}              parameters, a value per channel; kParameters has their names and fallbacks
//   kPrologue                              whether the op is applied to w = scale x + shift + residual instead of x
//   kMemoryBound                           whether moving the tensors takes longer than the arithmetic
//   kParallelChannels                      number of channels whose `precompute` is worth a thread
//   enum Constant {..., kConstants}        results of `precompute`, from a channel's parameters, once per call
//   enum Sum {..., kSums}                  sums over a channel, from which `parameter_gradients` computes gradients
//   Arithmetic<variant, T, Math>           `forward` and `gradients` of one value; k(i) reads constant i
//
// and, if the defaults of SimpleOp do not fit: Variant, Attributes, kInput, kFactor, kTable.
#pragma once
#include <array>
#include <optional>

#include "scalar.h"

namespace ctk {

struct Parameter {
  const char* name;
  std::optional<double> fallback = std::nullopt;  // value if absent; nullopt: required
};

// Result of Arithmetic::gradients: the gradient of w, and the terms of the sums over the channel.
template <class T, int sums_>
struct Terms {
  static constexpr int kSums = sums_;
  T w, sums[sums_];
};

// An op with one variant of its arithmetic, and no arguments other than tensors and the channel dimension.
struct SimpleOp {
  static constexpr const char* kInput = "x";  // name of the first tensor in the schema
  // Name of a tensor that multiplies the result; null: none. Absent from a call, it is the second half of x's channels.
  static constexpr const char* kFactor = nullptr;

  // Kernels are compiled for each variant.
  enum class Variant { kOnly };

  // Non-tensor arguments. `attributes` takes them in schema order.
  struct Attributes {};
  static constexpr std::array<const char*, 0> kAttributes{};
  static Attributes attributes() { return {}; }
  static Variant variant(const Attributes&) { return Variant::kOnly; }

  // Floats per channel that a separate GPU kernel precomputes for all blocks, and whether a call needs them: cuda/ctu.cuh.
  static constexpr int kTable = 0;
  static bool needs_table(const Attributes&) { return false; }
};

}  // namespace ctk
