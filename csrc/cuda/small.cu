// The kernels around a channelwise one, and those of the gates: small tensors, double precision.
#include "ctu.cuh"

namespace ctk::cuda {

__device__ __forceinline__ void knobs(const Knobs& a) {
  const uint32_t n = a.rows * a.channels, i = blockIdx.x * kKnobThreads + threadIdx.x;
  if (i >= n) return;
  const uint32_t g = i / a.channels, c = i % a.channels;
  const FloatKnobs k = narrowed_knobs(ctu_knobs(parameter(a.beta, g, c), parameter(a.coeff, g, c), a.ctu.raw, a.ctu.eps));
  const float made[kKnobFields] = {k.beta, k.beta_lo, k.s, k.s_lo, k.coeff, k.coeff1};
#pragma unroll
  for (int f = 0; f < kKnobFields; ++f) a.to[int64_t(f) * n + i] = made[f];
}

CTK_KERNEL(ctk_ctu_knobs, kKnobThreads, Knobs, knobs)
CTK_KERNEL(ctk_ctu_finish_f32, kFinishThreads, Finish, finish<Logistic<float>>)
CTK_KERNEL(ctk_ctu_finish_f64, kFinishThreads, Finish, finish<Logistic<double>>)
CTK_KERNEL(ctk_head_edit_finish_f32, kFinishThreads, Finish, finish<HeadEditUnit<float>>)
CTK_KERNEL(ctk_head_edit_finish_f64, kFinishThreads, Finish, finish<HeadEditUnit<double>>)
CTK_KERNEL(ctk_collect, kCollectThreads, Collect, collect)

template <class T>
__device__ __forceinline__ GateValue gate_at(const Gates& a, int64_t i) {
  T u = T(0.5);
  if (a.noise) u = a.seeded ? uniform<T>(*static_cast<const uint64_t*>(a.noise), i) : static_cast<const T*>(a.noise)[i];
  return evaluate(a.gate, static_cast<const T*>(a.log_alpha)[i], u);
}

template <class T>
__device__ __forceinline__ void gates_forward(const Gates& a) {
  const int64_t i = int64_t(blockIdx.x) * kGateThreads + threadIdx.x;
  if (i < a.n) static_cast<T*>(a.value)[i] = static_cast<T>(gate_at<T>(a, i).value);
}

template <class T>
__device__ __forceinline__ void gates_backward(const Gates& a) {
  const int64_t i = int64_t(blockIdx.x) * kGateThreads + threadIdx.x;
  if (i >= a.n) return;
  const GateValue gate = gate_at<T>(a, i);
  const double dy = static_cast<const T*>(a.dy)[i];
  if (a.d_log_alpha) static_cast<T*>(a.d_log_alpha)[i] = static_cast<T>(dy * gate.slope);
  if (a.d_noise) static_cast<T*>(a.d_noise)[i] = static_cast<T>(dy * gate.noise_slope);
}

CTK_KERNEL(ctk_gates_forward_f32, kGateThreads, Gates, gates_forward<float>)
CTK_KERNEL(ctk_gates_forward_f64, kGateThreads, Gates, gates_forward<double>)
CTK_KERNEL(ctk_gates_backward_f32, kGateThreads, Gates, gates_backward<float>)
CTK_KERNEL(ctk_gates_backward_f64, kGateThreads, Gates, gates_backward<double>)

}  // namespace ctk::cuda
