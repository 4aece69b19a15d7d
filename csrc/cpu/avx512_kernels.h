// Memory kernels for AVX-512: load, convert, compute and store in one pass, on the vectors of avx512_vectors.h.
#pragma once
#include "avx512_vectors.h"
#include "kernels.h"

namespace ctk::cpu {
namespace {
namespace avx512 {

// Calls f(i, live) for every N vectors of values from i; `live` masks the tail in the last call.
template <int N, class F>
CTK_HD void for_vectors(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + 16 * N <= n; i += 16 * N) f(i, kFull);
  if (i < n) f(i, (__mmask32(1) << (n - i)) - 1);
}

// Distances of prefetches. The hardware prefetches along a run too, but anew on each page, not vectors a row apart, and results
// only when they are stored; and this much arithmetic fills the window in which a core looks ahead by itself.
constexpr int64_t kBytesAhead = 2048;
constexpr int64_t kRowsAhead = kRunRows;

template <class T>
CTK_HD void prefetch(const T* p, int64_t i) {
  if (p) _mm_prefetch(reinterpret_cast<const char*>(p + i), _MM_HINT_T0);
}

// The op's arithmetic with the constants of 16 lanes, for each vector of a format.
template <class Format, class Unit>
std::array<Unit, Format::kVectors> lanes_ops(const float* constants, int64_t stride, __mmask32 live) {
  const auto of = [&](int h) {
    return Unit([&](int f) { return _mm512_maskz_loadu_ps(part(live, h), constants + f * stride + 16 * h); });
  };
  if constexpr (Format::kVectors == 1) return {of(0)};
  else return {of(0), of(1)};
}

// The prologue w = scale x + shift (+ residual), for each vector of a format.
template <class Format>
struct AffineVectors {
  V scale[Format::kVectors], shift[Format::kVectors];

  static AffineVectors plane(const Run<float>& run) {
    AffineVectors a;
    for (int h = 0; h < Format::kVectors; ++h) a.scale[h] = all(*run.scale), a.shift[h] = all(*run.shift);
    return a;
  }
  static AffineVectors lanes(const Run<float>& run, int64_t lane, __mmask32 live) {
    AffineVectors a;
    for (int h = 0; h < Format::kVectors; ++h) {
      a.scale[h] = _mm512_maskz_loadu_ps(part(live, h), run.scale + lane + 16 * h);
      a.shift[h] = _mm512_maskz_loadu_ps(part(live, h), run.shift + lane + 16 * h);
    }
    return a;
  }
  CTK_HD void apply(Vectors<Format::kVectors>& w, const typename Format::Value* residual, int64_t i, __mmask32 live) const {
    for (int h = 0; h < Format::kVectors; ++h) w.v[h] = _mm512_fmadd_ps(scale[h], w.v[h], shift[h]);
    if (!residual) return;
    const auto r = Format::load(residual + i, live);
    for (int h = 0; h < Format::kVectors; ++h) w.v[h] = _mm512_add_ps(w.v[h], r.v[h]);
  }
};

// The tensors of a call, typed.
template <class Format, class Unit, bool prologue>
struct Tensors {
  using Value = typename Format::Value;
  const Value *x, *residual, *factor, *dy;
  Value *y, *dx, *dresidual, *dfactor;
  bool stream;

  explicit Tensors(const MemoryCall& c)
      : x(static_cast<const Value*>(c.x)), residual(static_cast<const Value*>(c.residual)),
        factor(static_cast<const Value*>(c.factor)), dy(static_cast<const Value*>(c.dy)), y(static_cast<Value*>(c.y)),
        dx(static_cast<Value*>(c.dx)), dresidual(static_cast<Value*>(c.dresidual)), dfactor(static_cast<Value*>(c.dfactor)),
        stream(c.stream) {}

  // Distance between rows of tensors with the layout of x.
  CTK_HD static int64_t in_row(const Run<float>& run) { return Unit::kFactor ? run.in_row : run.row; }

  // Prefetches operands: dy from value i, the others, which have the layout of x, from value `in`.
  CTK_HD void prefetch_operands(int64_t in, int64_t i) const {
    prefetch(x, in);
    if constexpr (prologue) prefetch(residual, in);
    if constexpr (Unit::kFactor) prefetch(factor, in);
    prefetch(dy, i);
  }
  // Prefetches the lines that results are stored to.
  CTK_HD void prefetch_results(int64_t in, int64_t i) const {
    if (stream) return;
    prefetch(y, i);
    prefetch(dx, in);
    if constexpr (prologue) prefetch(dresidual, in);
    if constexpr (Unit::kFactor) prefetch(dfactor, in);
  }
  CTK_HD void prefetch_plane(int64_t i) const {
    constexpr int64_t ahead = kBytesAhead / sizeof(Value);
    prefetch_operands(i + ahead, i + ahead);
    prefetch_results(i, i);
  }
  CTK_HD void prefetch_row(int64_t in, int64_t i) const {
    prefetch_operands(in, i);
    prefetch_results(in, i);
  }
  // Multiplies the op's result by the factor, if there is one, and stores it.
  CTK_HD void store_result(Vectors<Format::kVectors>& y_, int64_t in, int64_t i, __mmask32 live) const {
    if constexpr (Unit::kFactor) {
      const auto f = Format::load(factor + in, live);
      for (int h = 0; h < Format::kVectors; ++h) y_.v[h] = _mm512_mul_ps(y_.v[h], f.v[h]);
    }
    store(y, i, live, y_);
  }
  // Stores the factor's gradient, and turns the gradient of the result into that of the op's result.
  template <class Ops>
  CTK_HD void backward_factor(const Ops& ops, const Vectors<Format::kVectors>& w, Vectors<Format::kVectors>& g, int64_t in, __mmask32 live) const {
    if constexpr (Unit::kFactor) {
      const auto f = Format::load(factor + in, live);
      Vectors<Format::kVectors> df;
      unrolled<Format::kVectors>([&](auto h) __attribute__((always_inline)) {
        df.v[h] = _mm512_mul_ps(g.v[h], ops(h).forward(w.v[h]));
        g.v[h] = _mm512_mul_ps(g.v[h], f.v[h]);
      });
      if (dfactor) store(dfactor, in, live, df);
    }
  }
  // Loads the op's input.
  CTK_HD auto input(const AffineVectors<Format>& affine, int64_t i, __mmask32 live) const {
    auto w = Format::load(x + i, live);
    if constexpr (prologue) affine.apply(w, residual, i, live);
    return w;
  }
  CTK_HD void store(Value* to, int64_t i, __mmask32 live, const Vectors<Format::kVectors>& v) const {
    Format::template store<Unit::kTiesToEven>(to + i, live, stream, v);
  }
  // Stores the gradients of x and the residual, from that of the op's input.
  CTK_HD void store_gradients(const AffineVectors<Format>& affine, int64_t i, __mmask32 live, Vectors<Format::kVectors>& g) const {
    if constexpr (prologue) {
      if (dresidual) store(dresidual, i, live, g);
      if (!dx) return;
      for (int h = 0; h < Format::kVectors; ++h) g.v[h] = _mm512_mul_ps(g.v[h], affine.scale[h]);
    }
    if (dx) store(dx, i, live, g);
  }
};

template <class Format, class Unit, bool prologue>
void forward_plane(MemoryCall c) {
  const Tensors<Format, Unit, prologue> t(c);
  const typename Unit::Shared op([&](int i) { return all(c.run.constants[i]); });
  AffineVectors<Format> affine;
  if constexpr (prologue) affine = AffineVectors<Format>::plane(c.run);
  for_vectors<Format::kVectors>(c.run.n, [&](int64_t i, __mmask32 live) __attribute__((always_inline)) {
    t.prefetch_plane(i);
    auto w = t.input(affine, i, live);
    for (V& v : w.v) v = op.forward(v);
    t.store_result(w, i, i, live);
  });
}

template <class Format, class Unit, bool prologue>
void forward_lanes(MemoryCall c) {
  const Tensors<Format, Unit, prologue> t(c);
  const int64_t rows = c.run.rows, row = c.run.row, in = t.in_row(c.run);
  for_vectors<Format::kVectors>(c.run.n, [&](int64_t i, __mmask32 live) __attribute__((always_inline)) {
    const auto ops = lanes_ops<Format, Unit>(c.run.constants + i, c.run.stride, live);
    AffineVectors<Format> affine;
    if constexpr (prologue) affine = AffineVectors<Format>::lanes(c.run, i, live);
    for (int64_t r = 0; r < rows; ++r) {
      t.prefetch_row((r + kRowsAhead) * in + i, (r + kRowsAhead) * row + i);
      auto w = t.input(affine, r * in + i, live);
      for (int h = 0; h < Format::kVectors; ++h) w.v[h] = ops[h].forward(w.v[h]);
      t.store_result(w, r * in + i, r * row + i, live);
    }
  });
}

template <class Format, class Unit>
void forward_affine_lanes(MemoryCall c) {
  const Tensors<Format, Unit, true> t(c);
  const typename Unit::Shared op([&](int i) { return all(c.run.constants[i]); });
  for (int64_t r = 0; r < c.run.rows; ++r)
    for_vectors<Format::kVectors>(c.run.n, [&](int64_t lane, __mmask32 live) __attribute__((always_inline)) {
      const int64_t i = r * c.run.row + lane;
      t.prefetch_row(i + kRowsAhead * c.run.row, i + kRowsAhead * c.run.row);
      auto w = t.input(AffineVectors<Format>::lanes(c.run, lane, live), i, live);
      for (V& v : w.v) v = op.forward(v);
      t.store(t.y, i, live, w);
    });
}

template <class Format, class Unit, bool prologue, bool sums>
void backward_plane(MemoryCall c) {
  const Tensors<Format, Unit, prologue> t(c);
  const Unit op([&](int i) { return all(c.run.constants[i]); });
  AffineVectors<Format> affine;
  if constexpr (prologue) affine = AffineVectors<Format>::plane(c.run);
  V sum[Format::kVectors][Unit::kSums] = {};
  const auto run = [&](auto write) __attribute__((always_inline)) {
    for_vectors<Format::kVectors>(c.run.n, [&](int64_t i, __mmask32 live) __attribute__((always_inline)) {
      t.prefetch_plane(i);
      auto w = t.input(affine, i, live);
      auto g = Format::load(t.dy + i, live);
      t.backward_factor([&](int) -> const Unit& { return op; }, w, g, i, live);
      unrolled<Format::kVectors>([&](auto h) __attribute__((always_inline)) {
        g.v[h] = op.template backward<sums>(w.v[h], g.v[h], sum[h]);
      });
      if constexpr (prologue || write) t.store_gradients(affine, i, live, g);
    });
  };
  if (t.dx) run(std::true_type{});
  else run(std::false_type{});
  if constexpr (sums) {
    unrolled<Unit::kSums>([&](auto s) __attribute__((always_inline)) {
      V all = sum[0][s];
      if constexpr (Format::kVectors == 2) all = _mm512_add_ps(all, sum[1][s]);
      c.totals[s] += _mm512_reduce_add_ps(all);
    });
  }
}

template <class Format, class Unit, bool prologue, bool sums>
void backward_lanes(MemoryCall c) {
  const Tensors<Format, Unit, prologue> t(c);
  const int64_t rows = c.run.rows, row = c.run.row, in = t.in_row(c.run);
  for_vectors<Format::kVectors>(c.run.n, [&](int64_t i, __mmask32 live) __attribute__((always_inline)) {
    V sum[Format::kVectors][Unit::kSums] = {};
    const auto ops = lanes_ops<Format, Unit>(c.run.constants + i, c.run.stride, live);
    AffineVectors<Format> affine;
    if constexpr (prologue) affine = AffineVectors<Format>::lanes(c.run, i, live);
    for (int64_t r = 0; r < rows; ++r) {
      t.prefetch_row((r + kRowsAhead) * in + i, (r + kRowsAhead) * row + i);
      auto w = t.input(affine, r * in + i, live);
      auto g = Format::load(t.dy + r * row + i, live);
      t.backward_factor([&](int h) -> const Unit& { return ops[h]; }, w, g, r * in + i, live);
      unrolled<Format::kVectors>([&](auto h) __attribute__((always_inline)) {
        g.v[h] = ops[h].template backward<sums>(w.v[h], g.v[h], sum[h]);
      });
      t.store_gradients(affine, r * in + i, live, g);
    }
    if constexpr (sums) {
      unrolled<Format::kVectors>([&](auto h) __attribute__((always_inline)) {
        unrolled<Unit::kSums>([&](auto s) __attribute__((always_inline)) {
          float* to = c.lanes + s * c.run.stride + i + 16 * h;
          const Mask m = part(live, h);
          _mm512_mask_storeu_ps(to, m, _mm512_add_ps(_mm512_maskz_loadu_ps(m, to), sum[h][s]));
        });
      });
    }
  });
}

template <class Op, typename Op::Variant variant, class Math>
struct Unit : Arithmetic<Op, variant, Math> {
  using Arithmetic<Op, variant, Math>::Arithmetic;
  static constexpr bool kFactor = kHasFactor<Op>;
};

template <class Op, typename Op::Variant variant, class Format>
constexpr MemoryKernels memory_kernels() {
  using U = Unit<Op, variant, typename Format::Math>;
  MemoryKernels k{};
  const auto set = [&]<bool prologue>(std::bool_constant<prologue>) {
    k.forward[kPlane][prologue] = forward_plane<Format, U, prologue>;
    k.forward[kLanes][prologue] = forward_lanes<Format, U, prologue>;
    if constexpr (prologue) k.forward[kAffineLanes][prologue] = forward_affine_lanes<Format, U>;
    k.backward[kPlane][prologue][0] = backward_plane<Format, U, prologue, false>;
    k.backward[kPlane][prologue][1] = backward_plane<Format, U, prologue, true>;
    k.backward[kLanes][prologue][0] = backward_lanes<Format, U, prologue, false>;
    k.backward[kLanes][prologue][1] = backward_lanes<Format, U, prologue, true>;
  };
  if constexpr (U::kSums > 0) {
    set(std::false_type{});
    if constexpr (Op::kPrologue) set(std::true_type{});
  }
  return k;
}

}  // namespace avx512
}  // namespace
}  // namespace ctk::cpu
