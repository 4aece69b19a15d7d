// Hard-concrete gates, one per thread, in double precision: they are few.
#include "args.h"
#include "kernel.cuh"

namespace ctk::cuda {

template <void each(const Gates&, int64_t)>
__device__ __forceinline__ void for_gates(const Gates& a) {
  const int64_t i = int64_t(blockIdx.x) * kGateThreads + threadIdx.x;
  if (i < a.n) each(a, i);
}

CTK_KERNEL(ctk_gates_forward_f32, kGateThreads, Gates, for_gates<gate_forward<float>>)
CTK_KERNEL(ctk_gates_forward_f64, kGateThreads, Gates, for_gates<gate_forward<double>>)
CTK_KERNEL(ctk_gates_backward_f32, kGateThreads, Gates, for_gates<gate_backward<float>>)
CTK_KERNEL(ctk_gates_backward_f64, kGateThreads, Gates, for_gates<gate_backward<double>>)

}  // namespace ctk::cuda
