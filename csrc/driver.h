// Arguments of the drivers of all backends, and the list of ops (ops.def) as C++.
#pragma once
#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <type_traits>

#include "hard_concrete.h"
#include "layout.h"
#include "op.h"
#define CTK_OP(...)
#include "ops.def"  // here for the ops' headers

namespace ctk {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

enum class DType : int { kFloat, kDouble, kBFloat16, kHalf };
inline constexpr int kDTypes = 4;
inline int64_t size_of(DType t) { return t == DType::kDouble ? 8 : t == DType::kFloat ? 4 : 2; }

// ---- ops -----------------------------------------------------------------------------------------------------------

// Parameters: the op's own, then the prologue's scale and shift. Sums: likewise.
template <class Op>
inline constexpr int kParamsOf = Op::kParams + (Op::kPrologue ? 2 : 0);
template <class Op>
inline constexpr int kSumsOf = Op::kSums + (Op::kPrologue ? 2 : 0);
template <class Op>
inline constexpr bool kHasFactor = Op::kFactor != nullptr;

template <class Op>
constexpr Parameter parameter_of(int i) {
  static_assert(std::size(Op::kParameters) == Op::kParams, "kParameters must name every Param");
  return i < Op::kParams ? Op::kParameters[i] : i == Op::kParams ? Parameter{"scale", 1.0} : Parameter{"shift", 0.0};
}

inline constexpr int kMaxParams = std::max({
#define CTK_OP(name, Op, ...) kParamsOf<Op>,
#include "ops.def"
});

// Rows of the kernel tables.
enum class Kernel : int {
#define CTK_KERNELS(stem, Op, variant) stem,
#include "ops.def"
};
inline constexpr const char* kKernelStems[] = {
#define CTK_KERNELS(stem, Op, variant) #stem,
#include "ops.def"
};
inline constexpr int kKernels = std::size(kKernelStems);

template <class Op>
inline constexpr const char* kName = nullptr;
template <class Op>
Kernel kernel_of(typename Op::Variant variant);

#define CTK_OP(name, Op, ...)                                             \
  template <>                                                             \
  inline constexpr const char* kName<Op> = #name;                         \
  template <>                                                             \
  inline Kernel kernel_of<Op>(Op::Variant variant) {                      \
    using Listed = Op;                                                    \
    switch (variant) { __VA_ARGS__ }                                      \
    throw std::invalid_argument("ctkernels: " #name ": no such variant"); \
  }
#define CTK_KERNELS(stem, Op, variant)                                                    \
  case Op::Variant::variant:                                                              \
    static_assert(std::is_same_v<Op, Listed>, #stem " is listed under another struct");   \
    return Kernel::stem;
#include "ops.def"

// ---- a call --------------------------------------------------------------------------------------------------------

// A parameter: `groups` rows of `count` values. Channel c reads value c / (channels / count): a count of 1 is shared by all
// channels, the number of heads is one per head. Group g of the view reads row g % groups.
struct Param {
  const void* data = nullptr;  // null: `fallback` for every channel
  bool is_double = false;
  int64_t groups = 1, count = 1;
  double fallback = 0.0;
  bool is_number = false;  // `fallback` was given; otherwise it stands for an absent parameter

  bool is_given() const { return data || is_number; }

  int64_t index(int64_t g, int64_t c, int64_t channels) const {
    return (g % groups) * count + (count == channels ? c : c / (channels / count));
  }
  int64_t numel() const { return groups * count; }
};

// The tensors are not empty; residual and factor have the layout of x. In a packed view, x and factor alternate in one tensor.
struct Operands {
  DType dtype;
  View view;
  const void* x;
  const void* residual = nullptr;
  const void* factor = nullptr;
  Param params[kMaxParams];
};

// Null outputs are not computed. A parameter's gradient has its shape and dtype.
struct Gradients {
  void* dx = nullptr;
  void* dresidual = nullptr;
  void* dfactor = nullptr;
  void* params[kMaxParams] = {};
};

}  // namespace ctk
