// Memory kernels for AVX-512: loads, conversions, arithmetic and stores in one pass, by the vectors of avx512_vectors.h.
#pragma once
#include <array>

#include "avx512_vectors.h"
#include "kernels.h"

namespace ctk::cpu {
namespace {
namespace avx512 {

// f(i, live) for every N vectors of values from i; all of them are live but in the last call.
template <int N, class F>
CTK_HD void for_vectors(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + 16 * N <= n; i += 16 * N) f(i, kFull);
  if (i < n) f(i, (__mmask32(1) << (n - i)) - 1);
}

// Asks for the line at `p`, of a row to come: the machine foresees runs, and not vectors a row apart.
constexpr int64_t kRowsAhead = 4;
template <class T>
CTK_HD void prefetch(const T* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
}

// The op with the constants of 16 lanes, for each vector of a format.
template <class Format, class Unit>
std::array<Unit, Format::kVectors> lanes_ops(const float* constants, int64_t stride, __mmask32 live) {
  const auto of = [&](int h) {
    return Unit([&](int f) { return _mm512_maskz_loadu_ps(part(live, h), constants + f * stride + 16 * h); });
  };
  if constexpr (Format::kVectors == 1) return {of(0)};
  else return {of(0), of(1)};
}

// w = scale x + shift (+ residual), for each vector of a format. `scale` and `shift` point to one value or to one a lane.
template <class Format>
struct AffineVectors {
  V scale[Format::kVectors], shift[Format::kVectors];

  static AffineVectors plane(const Prologue& p) {
    AffineVectors a;
    for (int h = 0; h < Format::kVectors; ++h) a.scale[h] = all(*p.scale), a.shift[h] = all(*p.shift);
    return a;
  }
  static AffineVectors lanes(const Prologue& p, int64_t lane, __mmask32 live) {
    AffineVectors a;
    for (int h = 0; h < Format::kVectors; ++h) {
      a.scale[h] = _mm512_maskz_loadu_ps(part(live, h), p.scale + lane + 16 * h);
      a.shift[h] = _mm512_maskz_loadu_ps(part(live, h), p.shift + lane + 16 * h);
    }
    return a;
  }
  static void prefetch_residual(const Prologue& p, int64_t i) {
    if (p.residual) prefetch(static_cast<const typename Format::Value*>(p.residual) + i);
  }
  CTK_HD void apply(Vectors<Format::kVectors>& w, const void* residual, int64_t i, __mmask32 live) const {
    for (int h = 0; h < Format::kVectors; ++h) w.v[h] = _mm512_fmadd_ps(scale[h], w.v[h], shift[h]);
    if (!residual) return;
    const auto r = Format::load(static_cast<const typename Format::Value*>(residual) + i, live);
    for (int h = 0; h < Format::kVectors; ++h) w.v[h] = _mm512_add_ps(w.v[h], r.v[h]);
  }
};

template <class Format, class Unit, bool prologue>
void forward_plane(const void* x_, void* y_, const float* constants, const Prologue* pro, int64_t n, bool stream) {
  const auto* x = static_cast<const typename Format::Value*>(x_);
  auto* y = static_cast<typename Format::Value*>(y_);
  const typename Unit::Shared op([&](int i) { return all(constants[i]); });
  AffineVectors<Format> affine;
  if constexpr (prologue) affine = AffineVectors<Format>::plane(*pro);
  for_vectors<Format::kVectors>(n, [&](int64_t i, __mmask32 live) __attribute__((always_inline)) {
    auto w = Format::load(x + i, live);
    if constexpr (prologue) affine.apply(w, pro->residual, i, live);
    for (V& v : w.v) v = op.forward(v);
    Format::template store<Unit::kTiesToEven>(y + i, live, stream, w);
  });
}

template <class Format, class Unit, bool prologue>
void forward_lanes(const void* x_, void* y_, const float* constants, int64_t stride, const Prologue* pro, int64_t rows,
                   int64_t row, int64_t n, bool stream) {
  const auto* x = static_cast<const typename Format::Value*>(x_);
  auto* y = static_cast<typename Format::Value*>(y_);
  for_vectors<Format::kVectors>(n, [&](int64_t i, __mmask32 live) __attribute__((always_inline)) {
    const auto ops = lanes_ops<Format, Unit>(constants + i, stride, live);
    AffineVectors<Format> affine;
    if constexpr (prologue) affine = AffineVectors<Format>::lanes(*pro, i, live);
    for (int64_t r = 0; r < rows; ++r) {
      prefetch(x + (r + kRowsAhead) * row + i);
      if constexpr (prologue) affine.prefetch_residual(*pro, (r + kRowsAhead) * row + i);
      auto w = Format::load(x + r * row + i, live);
      if constexpr (prologue) affine.apply(w, pro->residual, r * row + i, live);
      for (int h = 0; h < Format::kVectors; ++h) w.v[h] = ops[h].forward(w.v[h]);
      Format::template store<Unit::kTiesToEven>(y + r * row + i, live, stream, w);
    }
  });
}

// Stores the gradients of a prologue's residual and of x, from the gradient g of the op's input.
template <class Format, class Unit>
CTK_HD void store_through(const AffineVectors<Format>& affine, void* dresidual, typename Format::Value* dx, int64_t i,
                          __mmask32 live, bool stream, Vectors<Format::kVectors>& g) {
  if (dresidual) Format::template store<Unit::kTiesToEven>(static_cast<typename Format::Value*>(dresidual) + i, live, stream, g);
  if (!dx) return;
  for (int h = 0; h < Format::kVectors; ++h) g.v[h] = _mm512_mul_ps(g.v[h], affine.scale[h]);
  Format::template store<Unit::kTiesToEven>(dx + i, live, stream, g);
}

template <class Format, class Unit, bool prologue, bool sums>
void backward_plane(const void* x_, const void* dy_, void* dx_, const float* constants, const Prologue* pro, double* totals,
                      int64_t n, bool stream) {
  const auto* x = static_cast<const typename Format::Value*>(x_);
  const auto* dy = static_cast<const typename Format::Value*>(dy_);
  auto* dx = static_cast<typename Format::Value*>(dx_);
  const Unit op([&](int i) { return all(constants[i]); });
  AffineVectors<Format> affine;
  if constexpr (prologue) affine = AffineVectors<Format>::plane(*pro);
  V sum[Format::kVectors][Unit::kSums] = {};
  const auto run = [&](auto write) __attribute__((always_inline)) {
    for_vectors<Format::kVectors>(n, [&](int64_t i, __mmask32 live) __attribute__((always_inline)) {
      auto w = Format::load(x + i, live);
      if constexpr (prologue) affine.apply(w, pro->residual, i, live);
      auto g = Format::load(dy + i, live);
      unrolled<Format::kVectors>([&](auto h) __attribute__((always_inline)) {
        g.v[h] = op.template backward<sums>(w.v[h], g.v[h], sum[h]);
      });
      if constexpr (prologue) store_through<Format, Unit>(affine, pro->dresidual, dx, i, live, stream, g);
      else if constexpr (write) Format::template store<Unit::kTiesToEven>(dx + i, live, stream, g);
    });
  };
  if (dx) run(std::true_type{});
  else run(std::false_type{});
  if constexpr (sums) {
    unrolled<Unit::kSums>([&](auto s) __attribute__((always_inline)) {
      V all = sum[0][s];
      if constexpr (Format::kVectors == 2) all = _mm512_add_ps(all, sum[1][s]);
      totals[s] += _mm512_reduce_add_ps(all);
    });
  }
}

template <class Format, class Unit, bool prologue, bool sums>
void backward_lanes(const void* x_, const void* dy_, void* dx_, const float* constants, int64_t stride, const Prologue* pro,
                    float* lanes, int64_t rows, int64_t row, int64_t n, bool stream) {
  const auto* x = static_cast<const typename Format::Value*>(x_);
  const auto* dy = static_cast<const typename Format::Value*>(dy_);
  auto* dx = static_cast<typename Format::Value*>(dx_);
  for_vectors<Format::kVectors>(n, [&](int64_t i, __mmask32 live) __attribute__((always_inline)) {
    V sum[Format::kVectors][Unit::kSums] = {};
    const auto ops = lanes_ops<Format, Unit>(constants + i, stride, live);
    AffineVectors<Format> affine;
    if constexpr (prologue) affine = AffineVectors<Format>::lanes(*pro, i, live);
    for (int64_t r = 0; r < rows; ++r) {
      prefetch(x + (r + kRowsAhead) * row + i);
      prefetch(dy + (r + kRowsAhead) * row + i);
      if constexpr (prologue) affine.prefetch_residual(*pro, (r + kRowsAhead) * row + i);
      auto w = Format::load(x + r * row + i, live);
      if constexpr (prologue) affine.apply(w, pro->residual, r * row + i, live);
      auto g = Format::load(dy + r * row + i, live);
      unrolled<Format::kVectors>([&](auto h) __attribute__((always_inline)) {
        g.v[h] = ops[h].template backward<sums>(w.v[h], g.v[h], sum[h]);
      });
      if constexpr (prologue) store_through<Format, Unit>(affine, pro->dresidual, dx, r * row + i, live, stream, g);
      else if (dx) Format::template store<Unit::kTiesToEven>(dx + r * row + i, live, stream, g);
    }
    if constexpr (sums) {
      unrolled<Format::kVectors>([&](auto h) __attribute__((always_inline)) {
        unrolled<Unit::kSums>([&](auto s) __attribute__((always_inline)) {
          float* to = lanes + s * stride + i + 16 * h;
          const Mask m = part(live, h);
          _mm512_mask_storeu_ps(to, m, _mm512_add_ps(_mm512_maskz_loadu_ps(m, to), sum[h][s]));
        });
      });
    }
  });
}

template <class Op, typename Op::Variant variant, class Format>
constexpr MemoryKernels memory_kernels() {
  using U = Arithmetic<Op, variant, typename Format::Math>;
  MemoryKernels k{};
  if constexpr (U::kSums > 0) {
    k.forward_plane[0] = forward_plane<Format, U, false>;
    k.forward_lanes[0] = forward_lanes<Format, U, false>;
    k.backward_plane[0][0] = backward_plane<Format, U, false, false>;
    k.backward_plane[0][1] = backward_plane<Format, U, false, true>;
    k.backward_lanes[0][0] = backward_lanes<Format, U, false, false>;
    k.backward_lanes[0][1] = backward_lanes<Format, U, false, true>;
    if constexpr (Op::kPrologue) {
      k.forward_plane[1] = forward_plane<Format, U, true>;
      k.forward_lanes[1] = forward_lanes<Format, U, true>;
      k.backward_plane[1][0] = backward_plane<Format, U, true, false>;
      k.backward_plane[1][1] = backward_plane<Format, U, true, true>;
      k.backward_lanes[1][0] = backward_lanes<Format, U, true, false>;
      k.backward_lanes[1][1] = backward_lanes<Format, U, true, true>;
    }
  }
  return k;
}

}  // namespace avx512
}  // namespace
}  // namespace ctk::cpu
