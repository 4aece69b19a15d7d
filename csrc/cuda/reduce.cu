#include "ctu.cuh"
#include "kernel.cuh"
#include "reduce.cuh"

namespace ctk::cuda {

#define CTK_OP(name, Op, ...)                                                                                        \
  CTK_KERNEL(ctk_##name##_reduce_partials_f32, kReduceThreads, ReducePartials<Op>, (reduce_partials<Op, float>))     \
  CTK_KERNEL(ctk_##name##_reduce_partials_f64, kReduceThreads, ReducePartials<Op>, (reduce_partials<Op, double>))
#include "../ops.def"
CTK_KERNEL(ctk_reduce_shared, kSharedThreads, ReduceShared, reduce_shared)

__device__ __forceinline__ void ctu_precompute(const Precompute<CtuOp>& a) {
  const uint32_t n = a.rows * a.channels, i = blockIdx.x * kTableThreads + threadIdx.x;
  if (i >= n) return;
  const uint32_t g = i / a.channels, c = i % a.channels;
  const double beta = parameter(a.params[CtuOp::kBeta], g, c), coeff = parameter(a.params[CtuOp::kCoeff], g, c);
  const FloatKnobs k = float_knobs(ctu_knobs(beta, coeff, a.attributes.raw, a.attributes.eps));
  const float values[CtuOp::kTable] = {k.beta, k.beta_lo, k.s, k.s_lo, k.coeff, k.coeff1};
#pragma unroll
  for (int f = 0; f < CtuOp::kTable; ++f) a.to[int64_t(f) * n + i] = values[f];
}
CTK_KERNEL(ctk_ctu_precompute, kTableThreads, Precompute<CtuOp>, ctu_precompute)

}  // namespace ctk::cuda
