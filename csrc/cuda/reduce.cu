// The kernels after a channelwise one, which reduce partial sums to parameter gradients, in double and in a fixed order; and the
// one before it, which precomputes constants too expensive for every block.
#include "channelwise.cuh"
#include "ctu.cuh"
#include "kernel.cuh"

namespace ctk::cuda {

// A tree over the rows of a block (row, lane), for all sums in the mask `wanted` at once; row 0 ends up with the totals. Rows and
// lanes are powers of two. Within a warp, values are exchanged by shuffles.
template <int kSums>
__device__ __forceinline__ void add_rows(double (&total)[kSums], uint32_t wanted, uint32_t rows, uint32_t lanes, uint32_t row,
                                         uint32_t lane) {
  double* shared = reinterpret_cast<double*>(shared_bytes);  // [sum][row][lane]
  const uint32_t at = row * lanes + lane, threads = rows * lanes;
  uint32_t apart = threads / 2;  // distance, in threads, of the rows to add
  if (apart >= 32) {
#pragma unroll
    for (int s = 0; s < kSums; ++s)
      if (wanted >> s & 1) shared[s * threads + at] = total[s];
    for (; apart >= 32; apart /= 2) {
      __syncthreads();
      if (at >= apart) continue;
#pragma unroll
      for (int s = 0; s < kSums; ++s)
        if (wanted >> s & 1) shared[s * threads + at] = total[s] += shared[s * threads + at + apart];
    }
  }
  if (at >= 32) return;
  const uint32_t mask = threads < 32 ? (1u << threads) - 1 : 0xffffffffu;
#pragma unroll 1
  for (; apart >= lanes; apart /= 2) {
#pragma unroll
    for (int s = 0; s < kSums; ++s)
      if (wanted >> s & 1) total[s] += __shfl_xor_sync(mask, total[s], apart);
  }
}

// A block: blockDim.x channels (lanes) of one group, blockDim.y rows of terms. C: type of the partial sums.
template <class Op, class C>
__device__ __forceinline__ void reduce_partials(const ReducePartials<Op>& a) {
  constexpr int kSums = kSumsOf<Op>;
  const uint32_t lanes = blockDim.x, rows = blockDim.y, lane = threadIdx.x, row = threadIdx.y;
  const uint32_t blocks = (a.channels + lanes - 1) / lanes;
  const uint32_t g = blockIdx.x / blocks, c = blockIdx.x % blocks * lanes + lane;
  const uint32_t terms = a.slots * a.repeat * a.inner;
  double total[kSums] = {};
  if (c < a.channels) {
    // Terms (slot, repeat, i), of which this thread takes every rows-th. Their offsets are carried, not divided.
    const int64_t of_slot = int64_t(kSums) * a.columns, of_repeat = int64_t(a.channels) * a.inner;
    uint32_t repeat = row / a.inner % a.repeat, i = row % a.inner;
    const uint32_t repeats = rows / a.inner % a.repeat, is = rows % a.inner;
    const int64_t step = int64_t(rows / a.inner / a.repeat) * of_slot + repeats * of_repeat + is;
    const C* from = static_cast<const C*>(a.partial) + (int64_t(g) * a.slots + row / a.inner / a.repeat) * of_slot +
                    repeat * of_repeat + int64_t(c) * a.inner + i;
#pragma unroll 4  // independent loads
    for (uint32_t term = row; term < terms; term += rows) {
#pragma unroll
      for (int s = 0; s < kSums; ++s)
        if (a.wanted >> s & 1) total[s] += from[s * a.columns];
      from += step, i += is, repeat += repeats;
      if (i >= a.inner) i -= a.inner, ++repeat, from += of_repeat - a.inner;
      if (repeat >= a.repeat) repeat -= a.repeat, from += of_slot - a.repeat * of_repeat;
    }
  }
  add_rows(total, a.wanted, rows, lanes, row, lane);
  if (row == 0 && c < a.channels) write_gradients<Op, C>(a, g, c, a.channels, total);
}

__device__ __forceinline__ void reduce_shared(const ReduceShared& a) {
  uint32_t item = 0;
  while (item + 1 < a.items && blockIdx.x >= a.item[item + 1].first) ++item;
  const ReduceShared::Item& it = a.item[item];
  const uint32_t value = blockIdx.x - it.first, row = value / it.count, channel = value % it.count * it.run;
  const uint32_t groups = (a.groups - row + it.rows - 1) / it.rows;
  // Values (group, channel) of every rows-th group and `run` neighbouring channels, of which this thread takes every
  // blockDim.x-th.
  const int64_t of_group = int64_t(it.rows) * a.channels, step = blockDim.x / it.run * of_group + blockDim.x % it.run;
  uint32_t i = threadIdx.x % it.run;
  const double* from = it.from + int64_t(row) * a.channels + channel + threadIdx.x / it.run * of_group + i;
  double total[1] = {};
  for (uint64_t n = threadIdx.x; n < uint64_t(groups) * it.run; n += blockDim.x) {
    total[0] += *from;
    from += step, i += blockDim.x % it.run;
    if (i >= it.run) i -= it.run, from += of_group - it.run;
  }
  add_rows(total, 1, blockDim.x, 1, threadIdx.x, 0);
  if (threadIdx.x) return;
  if (it.is_double) static_cast<double*>(it.to)[value] = total[0];
  else static_cast<float*>(it.to)[value] = static_cast<float>(total[0]);
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
