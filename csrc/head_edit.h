// The head edit z' = (1 + g_m m) z + g_a a: y = scale w + offset, per channel of every head. The backward pass needs two sums
// per channel; each parameter gradient is one of them times another parameter.
#pragma once
#include "op.h"

namespace ctk {

struct HeadEditOp : SimpleOp {
  static constexpr const char* kInput = "z";
  enum Param : int { kM, kA, kGateM, kGateA, kParams };
  static constexpr Parameter kParameters[] = {{"m", 0.0}, {"a", 0.0}, {"g_m", 1.0}, {"g_a", 1.0}};
  static constexpr bool kPrologue = false, kMemoryBound = true;
  static constexpr int64_t kParallelChannels = 8192;

  enum Constant : int { kScale, kOffset, kConstants };
  enum Sum : int { kSumDyW, kSumDy, kSums };

  template <class P, class T>
  static CTK_ONCE void precompute(const Attributes&, const P* p, T* k) {
    k[kScale] = static_cast<T>(P(1) + p[kGateM] * p[kM]);
    k[kOffset] = static_cast<T>(p[kGateA] * p[kA]);
  }

  static CTK_ONCE void parameter_gradients(const Attributes&, const double* p, const double* sums, double* grads) {
    grads[kM] = p[kGateM] * sums[kSumDyW];
    grads[kA] = p[kGateA] * sums[kSumDy];
    grads[kGateM] = p[kM] * sums[kSumDyW];
    grads[kGateA] = p[kA] * sums[kSumDy];
  }

  template <Variant, class T, class Math>
  struct Arithmetic {
    using Gradients = Terms<T, kSums>;

    template <class K>
    static CTK_HD T forward(T w, const K& k) { return fused(k(kScale), w, k(kOffset)); }
    template <class K>
    static CTK_HD Gradients gradients(T w, T dy, const K& k) { return {dy * k(kScale), {dy * w, dy}}; }
  };
};

}  // namespace ctk
