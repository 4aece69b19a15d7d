// The skeleton of channelwise kernels: loops, accesses, sums. A block owns a tile of a tensor (see Tiling), cut so that
// its parameters are constants of the block (kPlane) or of each thread's columns. A thread moves V values at a time, 16
// bytes where the layout allows.
//
// Sums have a fixed order: a thread's own, a tree over a block's threads, then the blocks, by `finish`, in double.
#pragma once
#include "math.cuh"

namespace ctk::cuda {

template <bool kPlane, int V>
struct Place {
  uint32_t group, plane, row_cut, col_cut, first, last;
  int64_t begin, end;  // columns
  int64_t column;      // of this thread's first value
  bool known;          // whether that is one

  __device__ __forceinline__ explicit Place(const Tiling& t) {
    uint32_t b = blockIdx.x;
    col_cut = b % t.col_cuts, b /= t.col_cuts;
    row_cut = b % t.row_cuts, b /= t.row_cuts;
    plane = kPlane ? b % t.channels : 0, group = kPlane ? b / t.channels : b;
    begin = col_cut * t.cols_per, end = min(begin + t.cols_per, t.width);
    first = row_cut * t.rows_per, last = min(first + t.rows_per, t.rows);
    column = begin + threadIdx.x * V;
    known = column < t.width;
  }
  __device__ __forceinline__ uint32_t channel(const Tiling& t, int j) const {
    if (kPlane) return plane;
    if (!known) return 0;
    const uint32_t c = uint32_t(column) + j;
    return t.inner == 1 && t.width == t.channels ? c : c / t.inner % t.channels;
  }
};

// Calls f(offset) for the values of this thread, V at a time: steps along the rows of a plane, or down its columns.
template <bool kPlane, int V, class F>
__device__ __forceinline__ void for_values(const Tiling& t, const Place<kPlane, V>& place, const F& f) {
  if (!place.known) return;
  const uint32_t width = blockDim.x * V;
  int64_t start = place.group * t.group + place.first * t.row + place.column;
  if constexpr (kPlane) {
    start += place.plane * t.width;
    const uint32_t steps = place.column < place.end ? (uint32_t(place.end - place.column) + width - 1) / width : 0;
    for (uint32_t row = place.first; row < place.last; ++row, start += t.row) {
      int64_t at = start;
#pragma unroll 1  // the body is long
      for (uint32_t i = 0; i < steps; ++i, at += width) f(at);
    }
  } else {
    uint32_t rows = place.last - place.first;
    if (place.last == t.rows && (t.rows - 1) * t.row + place.column >= t.group) --rows;  // the last row may be shorter
    int64_t at = start;
#pragma unroll 1
    for (uint32_t i = 0; i < rows; ++i, at += t.row) f(at);
  }
}

// The values that go into the op: w = scale x + shift + residual.
template <bool kFull, class T, int V, class C, class K>
__device__ __forceinline__ void prologue(const void* residual, int64_t at, const K* k, bool plane, C* w) {
  if constexpr (kFull) {
#pragma unroll
    for (int j = 0; j < V; ++j) w[j] = fused(k[plane ? 0 : j].scale, w[j], k[plane ? 0 : j].shift);
    if (residual) {
      C r[V];
      load<T, V>(residual, at, r);
#pragma unroll
      for (int j = 0; j < V; ++j) w[j] += r[j];
    }
  }
}

// kFull: with the prologue.
template <class Unit, class T, bool kPlane, bool kFull, int V>
__device__ __forceinline__ void forward(const Channelwise& a) {
  using C = typename Unit::C;
  const Place<kPlane, V> place(a.tiling);
  typename Unit::Constants k[kPlane ? 1 : V];
  Unit::template derive<kPlane ? 1 : V>(a, place.group, [&](int j) { return place.channel(a.tiling, j); }, k);
  for_values(a.tiling, place, [&](int64_t at) {
    C w[V], y[V];
    load<T, V>(a.x, at, w);
    prologue<kFull, T, V>(a.residual, at, k, kPlane, w);
#pragma unroll
    for (int j = 0; j < V; ++j) y[j] = Unit::Op::forward(w[j], k[kPlane ? 0 : j]);
    store<T, V>(a.y, at, y);
  });
}

// ---- backward ------------------------------------------------------------------------------------------------------

template <class C>
__device__ __forceinline__ C warp_sum(C v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
  return v;
}

// From a channel's sums to the gradients of its parameters.
template <class Unit>
__device__ void write_gradients(const ParamRef* params, const GradRef* grads, const CtuStatic& ctu, uint32_t g, uint32_t c,
                                uint32_t channels, const double* sums) {
  double p[kMaxParams], made[kMaxParams];
#pragma unroll
  for (int i = 0; i < Unit::kParams; ++i) p[i] = parameter(params[i], g, c);
  Unit::finish(ctu, p, sums, made);
  const int64_t at = int64_t(g) * channels + c;
#pragma unroll
  for (int i = 0; i < Unit::kParams; ++i) {
    if (!grads[i].data) continue;
    if (grads[i].is_double) static_cast<double*>(grads[i].data)[at] = made[i];
    else static_cast<float*>(grads[i].data)[at] = static_cast<float>(made[i]);
  }
}

extern __shared__ __align__(16) unsigned char shared_bytes[];

template <class Unit, class T, bool kPlane, bool kFull, int V>
__device__ __forceinline__ void backward(const Channelwise& a) {
  using C = typename Unit::C;
  constexpr int kColumns = kPlane ? 1 : V;
  const Tiling& t = a.tiling;
  const Place<kPlane, V> place(t);
  typename Unit::Constants k[kColumns];
  Unit::template derive<kColumns>(a, place.group, [&](int j) { return place.channel(t, j); }, k);
  C sums[kSumSlots][kColumns] = {};
  // A loop of its own for frozen parameters, where that is common.
  const auto run = [&](auto with_sums) {
    for_values(t, place, [&](int64_t at) {
      C x[V], w[V], dy[V], g[V];
      load<T, V>(a.x, at, x), load<T, V>(a.dy, at, dy);
#pragma unroll
      for (int j = 0; j < V; ++j) w[j] = x[j];
      prologue<kFull, T, V>(a.residual, at, k, kPlane, w);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int column = kPlane ? 0 : j;
        const auto grad = Unit::Op::gradients(w[j], k[column]);
        g[j] = dy[j] * grad.w;
        if constexpr (decltype(with_sums)::value) {
#pragma unroll
          for (int s = 0; s < Unit::Op::kSums; ++s) sums[s][column] = fused(dy[j], grad.sums[s], sums[s][column]);
        }
        if constexpr (kFull) {
          sums[kCtuScaleSum][column] = fused(g[j], x[j], sums[kCtuScaleSum][column]);
          sums[kCtuShiftSum][column] += g[j];
        }
      }
      if (kFull && a.dresidual) store<T, V>(a.dresidual, at, g);
      if (a.dx) {
        if constexpr (kFull) {
#pragma unroll
          for (int j = 0; j < V; ++j) g[j] *= k[kPlane ? 0 : j].scale;
        }
        store<T, V>(a.dx, at, g);
      }
    });
  };
  if (kFull || a.wanted & kOwnSums) run(std::true_type{});
  else run(std::false_type{});
  if (!a.wanted) return;

  C* shared = reinterpret_cast<C*>(shared_bytes);
  if constexpr (kPlane) {  // one channel a block: a tree over the warps, in shared[sum][warp]
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int s = 0; s < kSumSlots; ++s) {
      if (!(a.wanted >> s & 1)) continue;
      const C v = warp_sum(sums[s][0]);
      if (threadIdx.x % 32 == 0) shared[s * warps + warp] = v;
    }
    __syncthreads();
    if (threadIdx.x) return;
    double total[kSumSlots];
#pragma unroll
    for (int s = 0; s < kSumSlots; ++s) {
      C v = 0;
      if (a.wanted >> s & 1)
        for (int i = 0; i < warps; ++i) v += shared[s * warps + i];
      total[s] = v;
      if (a.partial && a.wanted >> s & 1) {
        const int64_t slots = int64_t(t.row_cuts) * t.col_cuts, slot = int64_t(place.row_cut) * t.col_cuts + place.col_cut;
        static_cast<C*>(a.partial)[((place.group * slots + slot) * kSumSlots + s) * t.channels + place.plane] = v;
      }
    }
    if (!a.partial) write_gradients<Unit>(a.params, a.grads, a.ctu, place.group, place.plane, t.channels, total);
  } else if (a.partial) {
    if (!place.known) return;
    C* to = static_cast<C*>(a.partial) + (int64_t(place.group) * t.row_cuts + place.row_cut) * kSumSlots * t.width + place.column;
#pragma unroll
    for (int s = 0; s < kSumSlots; ++s) {
      if (!(a.wanted >> s & 1)) continue;
      constexpr int n = V * sizeof(C) >= 16 ? 16 / sizeof(C) : 1;
#pragma unroll
      for (int j = 0; j < V; j += n) store<C, n>(to, s * t.width + j, &sums[s][j]);
    }
  } else {  // a column is a channel, all of which this thread has seen; via shared[sum][j][thread], so that j is a loop
    if (!place.known) return;
    C* mine = shared + threadIdx.x;
#pragma unroll
    for (int s = 0; s < kSumSlots; ++s) {
#pragma unroll
      for (int j = 0; j < V; ++j) mine[(s * V + j) * blockDim.x] = sums[s][j];
    }
#pragma unroll 1
    for (int j = 0; j < V; ++j) {
      double total[kSumSlots];
#pragma unroll
      for (int s = 0; s < kSumSlots; ++s) total[s] = mine[(s * V + j) * blockDim.x];
      write_gradients<Unit>(a.params, a.grads, a.ctu, place.group, uint32_t(place.column) + j, t.channels, total);
    }
  }
}

}  // namespace ctk::cuda
