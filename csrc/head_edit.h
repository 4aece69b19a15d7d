// The head edit z' = (1 + g_m m) z + g_a a, per channel of every head: y = p w + q. The backward pass needs two column
// sums only, S1 = sum dy w and S0 = sum dy; every parameter gradient is a product of those with the parameters.
#pragma once
#include "scalar.h"

namespace ctk {

enum HeadEditField : int { kScale, kOffset, kHeadEditFields };

template <class T>
struct HeadEdit {
  static constexpr int kFields = kHeadEditFields;
  static constexpr int kSums = 2;  // S1, S0

  template <class K>
  static CTK_HD T forward(T w, const K& k) {
    return fused(k(kScale), w, k(kOffset));
  }

  struct Grads {
    T w, sums[2];
  };

  template <class K>
  static CTK_HD Grads gradients(T w, T dy, const K& k) {
    return {dy * k(kScale), {dy * w, dy}};
  }
};

}  // namespace ctk
