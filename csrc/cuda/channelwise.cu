// The channelwise kernels of one storage type: setup.py compiles this file for each type, with -DCTK_DTYPE=f32 and so on.
#include "channelwise.cuh"
#include "ctu.cuh"
#include "kernel.cuh"

namespace ctk::cuda {

// As in kernel names.
using f32 = float;
using f64 = double;
using bf16 = BFloat16;
using f16 = Half;

// FULL: with the prologue. V: values per access of a thread.
#define CTK_PASSES(STEM, OP, VARIANT, TYPE, FORM, FULL, V)                                                                    \
  CTK_KERNEL(STEM##_forward_##TYPE##_plane_##FORM, kMaxThreads, Channelwise<OP>, (forward<OP, VARIANT, TYPE, true, FULL, V>))   \
  CTK_KERNEL(STEM##_forward_##TYPE##_lanes_##FORM, kMaxThreads, Channelwise<OP>, (forward<OP, VARIANT, TYPE, false, FULL, V>))  \
  CTK_KERNEL(STEM##_backward_##TYPE##_plane_##FORM, kMaxThreads, Channelwise<OP>, (backward<OP, VARIANT, TYPE, true, FULL, V>)) \
  CTK_KERNEL(STEM##_backward_##TYPE##_lanes_##FORM, kMaxThreads, Channelwise<OP>, (backward<OP, VARIANT, TYPE, false, FULL, V>))
#define CTK_TYPED(...) CTK_PASSES(__VA_ARGS__)  // expands CTK_DTYPE

#define CTK_SCALAR(stem, Op, variant) CTK_TYPED(stem, Op, Op::Variant::variant, CTK_DTYPE, scalar, Op::kPrologue, 1)
#define CTK_VECTOR(stem, Op, variant) CTK_TYPED(stem, Op, Op::Variant::variant, CTK_DTYPE, vector, Op::kPrologue, 16 / sizeof(CTK_DTYPE))
#define CTK_PLAIN(stem, Op, variant) CTK_TYPED(stem, Op, Op::Variant::variant, CTK_DTYPE, plain, false, 16 / sizeof(CTK_DTYPE))

#define CTK_IS_DOUBLE_f64 1
#define CTK_PASTE(a, b) a##b
#define CTK_IS_DOUBLE(type) CTK_PASTE(CTK_IS_DOUBLE_, type)
#if CTK_IS_DOUBLE(CTK_DTYPE)
#define CTK_KERNELS CTK_SCALAR
#define CTK_DOUBLE_KERNELS CTK_VECTOR
#else
#define CTK_KERNELS(stem, Op, variant) CTK_SCALAR(stem, Op, variant) CTK_VECTOR(stem, Op, variant)
#define CTK_PLAIN_KERNELS CTK_PLAIN
#endif
#include "../ops.def"

}  // namespace ctk::cuda
