#include "finish.cuh"
#include "kernel.cuh"

namespace ctk::cuda {
#define CTK_HEAD_EDIT(TYPE, T, V)                                               \
  CTK_CHANNELWISE(head_edit, HeadEditUnit<T>, TYPE, T, one, false, 1)           \
  CTK_CHANNELWISE(head_edit, HeadEditUnit<T>, TYPE, T, wide, false, V)
CTK_HEAD_EDIT(f32, float, 4)
CTK_HEAD_EDIT(f64, double, 2)
CTK_HEAD_EDIT(bf16, BFloat16, 8)
CTK_HEAD_EDIT(f16, Half, 8)
}  // namespace ctk::cuda
