// The kernels after a channelwise one, from partial sums to parameter gradients, in double and in a fixed order; and the one before
// it, which precomputes what is too expensive for every block.
#include "channelwise.cuh"
#include "ctu.cuh"
#include "kernel.cuh"

namespace ctk::cuda {

// A tree over the rows of shared[row][lane]; the sums end up in row 0.
__device__ __forceinline__ void add_rows(double* shared, uint32_t rows, uint32_t lanes, uint32_t row, uint32_t lane) {
  for (uint32_t half = rows / 2; half; half /= 2) {
    __syncthreads();
    if (row < half) shared[row * lanes + lane] += shared[(row + half) * lanes + lane];
  }
}

// A block: blockDim.x channels (lanes) of one group, blockDim.y rows of terms. C: type of the partial sums.
template <class Op, class C>
__device__ __forceinline__ void reduce_partials(const ReducePartials<Op>& a) {
  constexpr int kSums = kSumsOf<Op>;
  double* shared = reinterpret_cast<double*>(shared_bytes);
  const uint32_t lanes = blockDim.x, rows = blockDim.y, lane = threadIdx.x, row = threadIdx.y;
  const uint32_t blocks = (a.channels + lanes - 1) / lanes;
  const uint32_t g = blockIdx.x / blocks, c = blockIdx.x % blocks * lanes + lane;
  const uint32_t per_slot = a.repeat * a.inner;
  const uint32_t terms = a.slots * per_slot;
  double total[kSums] = {};
  if (c < a.channels) {
#pragma unroll 4  // loads that need not wait for each other
    for (uint32_t term = row; term < terms; term += rows) {
      const uint32_t slot = term / per_slot, rest = term % per_slot, repeat = rest / a.inner, i = rest % a.inner;
      const C* from = static_cast<const C*>(a.partial) + (int64_t(g) * a.slots + slot) * kSums * a.columns +
                      (int64_t(repeat) * a.channels + c) * a.inner + i;
#pragma unroll
      for (int s = 0; s < kSums; ++s)
        if (a.wanted >> s & 1) total[s] += from[s * a.columns];
    }
  }
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    if (!(a.wanted >> s & 1)) continue;
    shared[row * lanes + lane] = total[s];
    add_rows(shared, rows, lanes, row, lane);
    if (row == 0) total[s] = shared[lane];
    __syncthreads();
  }
  if (row == 0 && c < a.channels) write_gradients<Op, C>(a, g, c, a.channels, total);
}

__device__ __forceinline__ void reduce_shared(const ReduceShared& a) {
  double* shared = reinterpret_cast<double*>(shared_bytes);
  uint32_t item = 0;
  while (item + 1 < a.items && blockIdx.x >= a.item[item + 1].first) ++item;
  const ReduceShared::Item& it = a.item[item];
  const uint32_t value = blockIdx.x - it.first, row = value / it.count, channel = value % it.count * it.run;
  const uint32_t groups = (a.groups - row + it.rows - 1) / it.rows;
  double total = 0;
  for (uint64_t i = threadIdx.x; i < uint64_t(groups) * it.run; i += blockDim.x)
    total += it.from[(row + i / it.run * it.rows) * a.channels + channel + i % it.run];
  shared[threadIdx.x] = total;
  add_rows(shared, blockDim.x, 1, threadIdx.x, 0);
  if (threadIdx.x) return;
  if (it.is_double) static_cast<double*>(it.to)[value] = shared[0];
  else static_cast<float*>(it.to)[value] = static_cast<float>(shared[0]);
}

#define CTK_OP(name, Op, ...)                                                                                        \
  CTK_KERNEL(ctk_##name##_reduce_partials_f32, kReduceThreads, ReducePartials<Op>, (reduce_partials<Op, float>))     \
  CTK_KERNEL(ctk_##name##_reduce_partials_f64, kReduceThreads, ReducePartials<Op>, (reduce_partials<Op, double>))
#include "../ops.def"
CTK_KERNEL(ctk_reduce_shared, kSharedThreads, ReduceShared, reduce_shared)

template <class Op>
__device__ __forceinline__ void ctu_precompute(const Precompute<Op>& a) {
  const uint32_t n = a.rows * a.channels, i = blockIdx.x * kTableThreads + threadIdx.x;
  if (i >= n) return;
  const uint32_t g = i / a.channels, c = i % a.channels;
  const double beta = parameter(a.params[CtuOp::kBeta], g, c), coeff = parameter(a.params[CtuOp::kCoeff], g, c);
  const FloatKnobs k = float_knobs(ctu_knobs(beta, coeff, a.attributes.raw, a.attributes.eps));
  const float values[CtuOp::kTable] = {k.beta, k.beta_lo, k.s, k.s_lo, k.coeff, k.coeff1};
#pragma unroll
  for (int f = 0; f < CtuOp::kTable; ++f) a.to[int64_t(f) * n + i] = values[f];
}
#define CTK_TABLE_KERNEL(stem, Op) CTK_KERNEL(stem##_precompute, kTableThreads, Precompute<Op>, (ctu_precompute<Op>))
#include "../ops.def"

}  // namespace ctk::cuda
