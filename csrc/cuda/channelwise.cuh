// The skeleton of channelwise kernels: loops, accesses, sums. A block owns a tile of a tensor (see Tiling), whose constants are
// the same for all its values (kPlane) or per column (lanes). A thread accesses V values at a time, 16 bytes if the layout
// allows.
//
// Sums have a fixed order: within a thread, a tree over a block's threads, then over blocks (reduce.cu), in double.
#pragma once
#include "math.cuh"

namespace ctk::cuda {

template <bool kPlane, int V>
struct Tile {
  uint32_t group, plane, row_cut, col_cut, first, last;
  int64_t begin, end;  // columns
  int64_t column;      // of this thread's first value
  bool inside;         // whether that is within the row

  __device__ __forceinline__ explicit Tile(const Tiling& t) {
    uint32_t b = blockIdx.x;
    col_cut = b % t.col_cuts, b /= t.col_cuts;
    row_cut = b % t.row_cuts, b /= t.row_cuts;
    plane = kPlane ? b % t.channels : 0, group = kPlane ? b / t.channels : b;
    begin = col_cut * t.cols_per, end = min(begin + t.cols_per, t.width);
    first = row_cut * t.rows_per, last = min(first + t.rows_per, t.rows);
    column = begin + threadIdx.x * V;
    inside = column < t.width;
  }
  // The channels of this thread's values; one in a plane.
  template <int N>
  __device__ __forceinline__ void channels(const Tiling& t, uint32_t (&c)[N]) const {
    const bool plain = t.inner == 1 && t.width == t.channels;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const uint32_t at = uint32_t(column) + j;
      c[j] = kPlane ? plane : !inside ? 0 : plain ? at : at / t.inner % t.channels;
    }
  }
};

// Offsets of a step's values: in results, and in tensors with the layout of x.
struct At {
  int64_t result, x;
};

// A thread's path through its tile, V values at a time: along the rows of a plane, or down its columns. kPacks: the tensor may be
// packed; x then has twice as many values before a row as results have.
template <bool kPlane, int V, bool kPacks>
struct Walk {
  int64_t result, row, start, ahead = 0, ahead_row = 0;
  uint32_t left, steps, step = 0;

  __device__ __forceinline__ Walk(const Tiling& t, const Tile<kPlane, V>& tile) : row(t.row) {
    start = tile.group * t.group + tile.first * t.row;
    if (kPacks && t.packed) ahead = start, ahead_row = row;
    start += tile.column;
    left = tile.last - tile.first;
    if constexpr (kPlane) {
      const uint32_t width = blockDim.x * V;
      start += tile.plane * t.width;
      steps = tile.column < tile.end ? (uint32_t(tile.end - tile.column) + width - 1) / width : 0;
      left *= steps;
    } else if (tile.last == t.rows && (t.rows - 1) * t.row + tile.column >= t.group) {
      --left;  // the last row may be shorter
    }
    if (!tile.inside) left = 0;
    result = start;
  }
  __device__ __forceinline__ At at() const { return {result, kPacks ? result + ahead : result}; }
  __device__ __forceinline__ void next() {
    if (!kPlane) result += row, ahead += ahead_row;
    else if (++step == steps) step = 0, result = start += row, ahead += ahead_row;
    else result += blockDim.x * V;
  }
};

// Calls use(fetch(at), at) along the path. kAhead: loads are issued one step ahead, to overlap with arithmetic. In a plane's
// forward pass, few constants allow so many threads per multiprocessor that this is not worth its instructions.
template <bool kAhead, bool kPacks, bool kPlane, int V, class Fetch, class Use>
__device__ __forceinline__ void for_values(const Tiling& t, const Tile<kPlane, V>& tile, const Fetch& fetch, const Use& use) {
  Walk<kPlane, V, kPacks> walk(t, tile);
  if (!walk.left) return;
  if constexpr (kAhead) {
    auto ahead = fetch(walk.at());
#pragma unroll 1  // the body is long
    for (;;) {
      const auto now = ahead;
      const At at = walk.at();
      if (--walk.left) walk.next(), ahead = fetch(walk.at());
      use(now, at);
      if (!walk.left) break;
    }
  } else {
    const uint32_t width = blockDim.x * V;
    for (uint32_t row = tile.first; row < tile.last; ++row, walk.start += t.row, walk.ahead += walk.ahead_row) {
      walk.result = walk.start;
#pragma unroll 1
      for (uint32_t i = 0; i < walk.steps; ++i, walk.result += width) use(fetch(walk.at()), walk.at());
    }
  }
}

// The loads of a step.
template <class T, int V>
struct Read {
  Bits<T, V> x, residual, factor, dy;
};
template <class T, int V, bool kFull, bool kBackward, class Op>
__device__ __forceinline__ Read<T, V> read(const Channelwise<Op>& a, At at) {
  Read<T, V> r;
  r.x = fetch<T, V>(a.x, at.x);
  if (kFull && a.residual) r.residual = fetch<T, V>(a.residual, at.x);
  if (kHasFactor<Op>) r.factor = fetch<T, V>(a.factor, at.x);
  if (kBackward) r.dy = fetch<T, V>(a.dy, at.result);
  return r;
}

// Computes the op's input: w = scale x + shift + residual.
template <bool kFull, class T, int V, class C, class K>
__device__ __forceinline__ void prologue(bool has_residual, const Bits<T, V>& residual, const K* k, bool plane, C* w) {
  if constexpr (kFull) {
#pragma unroll
    for (int j = 0; j < V; ++j) w[j] = fused(k[plane ? 0 : j].scale, w[j], k[plane ? 0 : j].shift);
    if (has_residual) {
      C r[V];
      unpack(residual, r);
#pragma unroll
      for (int j = 0; j < V; ++j) w[j] += r[j];
    }
  }
}

// Computes the constants of this thread's channels: one set in a plane.
template <class Op, typename Op::Variant variant, class T, bool kFull, class Tile, class K, int N>
__device__ __forceinline__ void constants(const Channelwise<Op>& a, const Tile& tile, K (&k)[N]) {
  using C = typename Storage<T>::Compute;
  uint32_t channels[N];
  tile.channels(a.tiling, channels);
  OnGpu<Op, C>::template precompute<variant, typename Storage<T>::Math>(a, tile.group, channels, k);
  if constexpr (kFull) {
    C scale[N], shift[N];
    parameters(a.params[Op::kParams], tile.group, channels, scale), parameters(a.params[Op::kParams + 1], tile.group, channels, shift);
#pragma unroll
    for (int j = 0; j < N; ++j) k[j].scale = scale[j], k[j].shift = shift[j];
  }
}

// kFull: with the prologue.
template <class Op, typename Op::Variant variant, class T, bool kPlane, bool kFull, int V>
__device__ __forceinline__ void forward(const Channelwise<Op>& a) {
  using C = typename Storage<T>::Compute;
  using Arithmetic = typename Op::template Arithmetic<variant, C, typename Storage<T>::Math>;
  const Tile<kPlane, V> tile(a.tiling);
  typename OnGpu<Op, C>::Constants k[kPlane ? 1 : V];
  constants<Op, variant, T, kFull>(a, tile, k);
  const auto use = [&](const Read<T, V>& in, At at) {
    C w[V], y[V];
    unpack(in.x, w);
    prologue<kFull>(a.residual, in.residual, k, kPlane, w);
#pragma unroll
    for (int j = 0; j < V; ++j) y[j] = Arithmetic::forward(w[j], k[kPlane ? 0 : j]);
    if constexpr (kHasFactor<Op>) {
      C factor[V];
      unpack(in.factor, factor);
#pragma unroll
      for (int j = 0; j < V; ++j) y[j] *= factor[j];
    }
    store<T, V>(a.y, at.result, y);
  };
  for_values<!kPlane, kHasFactor<Op>>(a.tiling, tile, [&](At at) { return read<T, V, kFull, false>(a, at); }, use);
}

// ---- backward ------------------------------------------------------------------------------------------------------

template <class C>
__device__ __forceinline__ C warp_sum(C v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
  return v;
}

// Writes the gradients of a channel's parameters, from its sums. A: Channelwise or ReducePartials. C: type of the arithmetic.
template <class Op, class C, class A>
__device__ void write_gradients(const A& a, uint32_t g, uint32_t c, uint32_t channels, const double* sums) {
  double p[Op::kParams], made[kParamsOf<Op>];
#pragma unroll
  for (int i = 0; i < Op::kParams; ++i) p[i] = parameter(a.params[i], g, c);
  OnGpu<Op, C>::parameter_gradients(a.attributes, p, sums, made);
#pragma unroll
  for (int i = Op::kParams; i < kParamsOf<Op>; ++i) made[i] = sums[Op::kSums + i - Op::kParams];
  const int64_t at = int64_t(g) * channels + c;
#pragma unroll
  for (int i = 0; i < kParamsOf<Op>; ++i) {
    if (!a.grads[i].data) continue;
    if (a.grads[i].is_double) static_cast<double*>(a.grads[i].data)[at] = made[i];
    else static_cast<float*>(a.grads[i].data)[at] = static_cast<float>(made[i]);
  }
}

extern __shared__ __align__(16) unsigned char shared_bytes[];

template <class Op, typename Op::Variant variant, class T, bool kPlane, bool kFull, int V>
__device__ __forceinline__ void backward(const Channelwise<Op>& a) {
  using C = typename Storage<T>::Compute;
  using Arithmetic = typename Op::template Arithmetic<variant, C, typename Storage<T>::Math>;
  constexpr int kColumns = kPlane ? 1 : V, kSums = kSumsOf<Op>;
  const Tiling& t = a.tiling;
  const Tile<kPlane, V> tile(t);
  typename OnGpu<Op, C>::Constants k[kColumns];
  constants<Op, variant, T, kFull>(a, tile, k);
  C sums[kSums][kColumns] = {};
  // Frozen parameters, common without a prologue, have a loop without sums.
  const auto run = [&](auto with_sums) {
    const auto use = [&](const Read<T, V>& in, At at) {
      C x[V], w[V], dy[V], g[V];
      unpack(in.x, x), unpack(in.dy, dy);
#pragma unroll
      for (int j = 0; j < V; ++j) w[j] = x[j];
      prologue<kFull>(a.residual, in.residual, k, kPlane, w);
      if constexpr (kHasFactor<Op>) {
        C factor[V], dfactor[V];
        unpack(in.factor, factor);
#pragma unroll
        for (int j = 0; j < V; ++j) dfactor[j] = dy[j] * Arithmetic::forward(w[j], k[kPlane ? 0 : j]), dy[j] *= factor[j];
        if (a.dfactor) store<T, V>(a.dfactor, at.x, dfactor);
      }
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int column = kPlane ? 0 : j;
        const auto grad = Arithmetic::gradients(w[j], dy[j], k[column]);
        g[j] = grad.w;
        if constexpr (decltype(with_sums)::value) {
#pragma unroll
          for (int s = 0; s < Arithmetic::Gradients::kSums; ++s) sums[s][column] += grad.sums[s];
        }
        if constexpr (kFull) {
          sums[Op::kSums][column] = fused(g[j], x[j], sums[Op::kSums][column]);
          sums[Op::kSums + 1][column] += g[j];
        }
      }
      if (kFull && a.dresidual) store<T, V>(a.dresidual, at.x, g);
      if (a.dx) {
        if constexpr (kFull) {
#pragma unroll
          for (int j = 0; j < V; ++j) g[j] *= k[kPlane ? 0 : j].scale;
        }
        store<T, V>(a.dx, at.x, g);
      }
    };
    for_values<true, kHasFactor<Op>>(t, tile, [&](At at) { return read<T, V, kFull, true>(a, at); }, use);
  };
  if (kFull || a.wanted & ((1u << Op::kSums) - 1)) run(std::true_type{});
  else run(std::false_type{});
  if (!a.wanted) return;

  C* shared = reinterpret_cast<C*>(shared_bytes);
  if constexpr (kPlane) {  // one channel per block: a tree over the warps, in shared[sum][warp]
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      if (!(a.wanted >> s & 1)) continue;
      const C v = warp_sum(sums[s][0]);
      if (threadIdx.x % 32 == 0) shared[s * warps + warp] = v;
    }
    __syncthreads();
    if (threadIdx.x) return;
    double total[kSums];
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      C v = 0;
      if (a.wanted >> s & 1)
        for (int i = 0; i < warps; ++i) v += shared[s * warps + i];
      total[s] = v;
      if (a.partial && a.wanted >> s & 1) {
        const int64_t slots = int64_t(t.row_cuts) * t.col_cuts, slot = int64_t(tile.row_cut) * t.col_cuts + tile.col_cut;
        static_cast<C*>(a.partial)[((tile.group * slots + slot) * kSums + s) * t.channels + tile.plane] = v;
      }
    }
    if (!a.partial) write_gradients<Op, C>(a, tile.group, tile.plane, t.channels, total);
  } else if (a.partial) {
    if (!tile.inside) return;
    C* to = static_cast<C*>(a.partial) + (int64_t(tile.group) * t.row_cuts + tile.row_cut) * kSums * t.width + tile.column;
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      if (!(a.wanted >> s & 1)) continue;
      constexpr int n = V * sizeof(C) >= 16 ? 16 / sizeof(C) : 1;
#pragma unroll
      for (int j = 0; j < V; j += n) store<C, n>(to, s * t.width + j, &sums[s][j]);
    }
  } else if constexpr (V == 1) {  // a column is a channel, and this thread has seen all of it
    if (!tile.inside) return;
    double total[kSums];
#pragma unroll
    for (int s = 0; s < kSums; ++s) total[s] = sums[s][0];
    write_gradients<Op, C>(a, tile.group, uint32_t(tile.column), t.channels, total);
  }
}

}  // namespace ctk::cuda
