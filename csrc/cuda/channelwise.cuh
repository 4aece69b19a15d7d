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
  // The channels of this thread's values: of a plane, one.
  template <int N>
  __device__ __forceinline__ void channels(const Tiling& t, uint32_t (&c)[N]) const {
    const bool plain = t.inner == 1 && t.width == t.channels;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const uint32_t at = uint32_t(column) + j;
      c[j] = kPlane ? plane : !known ? 0 : plain ? at : at / t.inner % t.channels;
    }
  }
};

// A thread's way through its tile, V values at a time: along the rows of a plane, or down its columns.
template <bool kPlane, int V>
struct Walk {
  int64_t at, row, start;
  uint32_t left, steps, step = 0;

  __device__ __forceinline__ Walk(const Tiling& t, const Place<kPlane, V>& place) : row(t.row) {
    start = place.group * t.group + place.first * t.row + place.column;
    left = place.last - place.first;
    if constexpr (kPlane) {
      const uint32_t width = blockDim.x * V;
      start += place.plane * t.width;
      steps = place.column < place.end ? (uint32_t(place.end - place.column) + width - 1) / width : 0;
      left *= steps;
    } else if (place.last == t.rows && (t.rows - 1) * t.row + place.column >= t.group) {
      --left;  // the last row may be shorter
    }
    if (!place.known) left = 0;
    at = start;
  }
  __device__ __forceinline__ void next() {
    if (!kPlane) at += row;
    else if (++step == steps) step = 0, at = start += row;
    else at += blockDim.x * V;
  }
};

// Calls use(fetch(offset), offset) along the way, what a step reads fetched a step ahead: the arithmetic of one does not last
// as long as memory takes. Forward, a plane's few constants leave room for so many threads that it is not worth its
// instructions (kAhead).
template <bool kAhead, bool kPlane, int V, class Fetch, class Use>
__device__ __forceinline__ void for_values(const Tiling& t, const Place<kPlane, V>& place, const Fetch& fetch, const Use& use) {
  Walk<kPlane, V> walk(t, place);
  if (!walk.left) return;
  if constexpr (kAhead) {
    auto ahead = fetch(walk.at);
#pragma unroll 1  // the body is long
    for (;;) {
      const auto now = ahead;
      const int64_t at = walk.at;
      if (--walk.left) walk.next(), ahead = fetch(walk.at);
      use(now, at);
      if (!walk.left) break;
    }
  } else {
    const uint32_t width = blockDim.x * V;
    for (uint32_t row = place.first; row < place.last; ++row, walk.start += t.row) {
      int64_t at = walk.start;
#pragma unroll 1
      for (uint32_t i = 0; i < walk.steps; ++i, at += width) use(fetch(at), at);
    }
  }
}

// What a step reads. `residual` and `dy` are left out where they are not there.
template <class T, int V>
struct Read {
  Bits<T, V> x, residual, dy;
};
template <class T, int V, bool kFull, bool kBackward>
__device__ __forceinline__ Read<T, V> read(const Channelwise& a, int64_t at) {
  Read<T, V> r;
  r.x = fetch<T, V>(a.x, at);
  if (kFull && a.residual) r.residual = fetch<T, V>(a.residual, at);
  if (kBackward) r.dy = fetch<T, V>(a.dy, at);
  return r;
}

// The values that go into the op: w = scale x + shift + residual.
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

// kFull: with the prologue.
template <class Unit, class T, bool kPlane, bool kFull, int V>
__device__ __forceinline__ void forward(const Channelwise& a) {
  using C = typename Unit::C;
  const Place<kPlane, V> place(a.tiling);
  uint32_t channels[kPlane ? 1 : V];
  typename Unit::Constants k[kPlane ? 1 : V];
  place.channels(a.tiling, channels);
  Unit::template derive<kFull>(a, place.group, channels, k);
  const auto use = [&](const Read<T, V>& given, int64_t at) {
    C w[V], y[V];
    unpack(given.x, w);
    prologue<kFull>(a.residual, given.residual, k, kPlane, w);
#pragma unroll
    for (int j = 0; j < V; ++j) y[j] = Unit::Op::forward(w[j], k[kPlane ? 0 : j]);
    store<T, V>(a.y, at, y);
  };
  for_values<!kPlane>(a.tiling, place, [&](int64_t at) { return read<T, V, kFull, false>(a, at); }, use);
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
  uint32_t channels[kColumns];
  typename Unit::Constants k[kColumns];
  place.channels(t, channels);
  Unit::template derive<kFull>(a, place.group, channels, k);
  C sums[kSumSlots][kColumns] = {};
  // A loop of its own for frozen parameters, where that is common.
  const auto run = [&](auto with_sums) {
    const auto use = [&](const Read<T, V>& given, int64_t at) {
      C x[V], w[V], dy[V], g[V];
      unpack(given.x, x), unpack(given.dy, dy);
#pragma unroll
      for (int j = 0; j < V; ++j) w[j] = x[j];
      prologue<kFull>(a.residual, given.residual, k, kPlane, w);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int column = kPlane ? 0 : j;
        const auto grad = Unit::Op::gradients(w[j], dy[j], k[column]);
        g[j] = grad.w;
        if constexpr (decltype(with_sums)::value) {
#pragma unroll
          for (int s = 0; s < Unit::Op::kSums; ++s) sums[s][column] += grad.sums[s];
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
    };
    for_values<true>(t, place, [&](int64_t at) { return read<T, V, kFull, true>(a, at); }, use);
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
  } else if constexpr (V == 1) {  // a column is a channel, all of which this thread has seen
    if (!place.known) return;
    double total[kSumSlots];
#pragma unroll
    for (int s = 0; s < kSumSlots; ++s) total[s] = sums[s][0];
    write_gradients<Unit>(a.params, a.grads, a.ctu, place.group, uint32_t(place.column), t.channels, total);
  }
}

}  // namespace ctk::cuda
