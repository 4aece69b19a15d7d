// The CT unit's kernels over one storage type. Forms: `one` value a thread; `wide`, 16 bytes a thread; `lean`, the same
// without the prologue, for the unit that networks are full of.
#pragma once
#include "finish.cuh"
#include "kernel.cuh"

namespace ctk::cuda {
template <class T>
using Logistic = CtuUnit<CtuKind::kLogistic, T>;
template <class T>
using Leaky = CtuUnit<CtuKind::kLeaky, T>;
template <class T>
using Relu6 = CtuUnit<CtuKind::kRelu6, T>;
template <class T>
using Gaussian = CtuUnit<CtuKind::kGaussian, T>;
}  // namespace ctk::cuda

#define CTK_CTU(TYPE, T, FORM, V)                                 \
  CTK_CHANNELWISE(logistic, Logistic<T>, TYPE, T, FORM, true, V)  \
  CTK_CHANNELWISE(leaky, Leaky<T>, TYPE, T, FORM, true, V)        \
  CTK_CHANNELWISE(relu6, Relu6<T>, TYPE, T, FORM, true, V)        \
  CTK_CHANNELWISE(gaussian, Gaussian<T>, TYPE, T, FORM, true, V)
