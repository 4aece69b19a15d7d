// The kernels of one SIMD level. The build compiles this file once per level, with that level's flags; CTK_LEVEL names the table
// it exports. Everything else has internal linkage, so that the linker cannot pick a wide level's code for a narrow machine.
#include "kernels.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif
#if defined(__AVX512BW__)
#include "avx512_kernels.h"
#endif

#define CTK_STR2(x) #x
#define CTK_STR(x) CTK_STR2(x)

namespace ctk::cpu {
namespace {

#if defined(__aarch64__)
using Half = __fp16;  // g++ has _Float16 in C++ for ARM from version 13 on
#else
using Half = _Float16;
#endif

template <class T, int N>
struct Uniform {
  T k[N];
  explicit Uniform(const T* p) {
    for (int i = 0; i < N; ++i) k[i] = p[i];
  }
  CTK_HD T operator()(int i) const { return k[i]; }
};

template <class T>
struct Lane {
  const T* p;
  int64_t stride;
  CTK_HD T operator()(int i) const { return p[i * stride]; }
};

// One variant of an op's arithmetic in one type.
template <class Op_, typename Op_::Variant variant, class T, class Math>
struct Unit : Op_::template Arithmetic<variant, T, Math> {
  using Op = Op_;
  using Constants = Uniform<T, Op::kConstants>;
  static constexpr bool kFactor = kHasFactor<Op>;
  static constexpr int kSums = Op::template Arithmetic<variant, T, Math>::Gradients::kSums;
  static_assert(kSums >= 1 && kSums <= 5, "CTK_ADD_TERMS");
  // Rows whose terms are summed per lane in registers: memory-bound ops gain from it.
  static constexpr int kRows = Op::kMemoryBound ? kRunRows : 1;
};

// A name for each sum: the compiler does not keep arrays in vector registers.
#define CTK_ADD_TERMS(Unit, s0, s1, s2, s3, s4, terms)     \
  s0 += (terms)[0];                                        \
  if constexpr (Unit::kSums > 1) s1 += (terms)[1];         \
  if constexpr (Unit::kSums > 2) s2 += (terms)[2];         \
  if constexpr (Unit::kSums > 3) s3 += (terms)[3];         \
  if constexpr (Unit::kSums > 4) s4 += (terms)[4]

// Value i of the result.
template <class Unit, class T, class K>
CTK_HD T forward_at(const T* w, const T* factor, int64_t i, const K& k) {
  const T y = Unit::forward(w[i], k);
  if constexpr (Unit::kFactor) return y * factor[i];
  else return y;
}

// Stores the gradients of w and the factor at value i; returns the terms of the sums.
template <class Unit, class T, class K>
CTK_HD auto backward_at(const T* w, const T* factor, T dy, T* dw, T* dfactor, int64_t i, const K& k) {
  const T value = w[i], scaled = [&]() __attribute__((always_inline)) {
    if constexpr (Unit::kFactor) return dy * factor[i];
    else return dy;
  }();
  const auto g = Unit::gradients(value, scaled, k);
  dw[i] = g.w;
  if constexpr (Unit::kFactor) dfactor[i] = dy * Unit::forward(value, k);
  return g;
}

// Distance between rows of tensors with the layout of x.
template <class Unit, class T>
CTK_HD int64_t in_row(const Run<T>& run) { return Unit::kFactor ? run.in_row : run.row; }

template <class Unit, class T>
void forward_plane(const T* __restrict w, const T* __restrict factor, T* __restrict y, const Run<T>& run) {
  const typename Unit::Constants k(run.constants);
  const int64_t n = run.n;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = forward_at<Unit>(w, factor, i, k);
}

template <class Unit, class T>
void forward_lanes(const T* __restrict w, const T* __restrict factor, T* __restrict y, const Run<T>& run) {
  const T* __restrict constants = run.constants;
  const int64_t n = run.n, row = run.row, in = in_row<Unit>(run), stride = run.stride;
  for (int64_t r = 0; r < run.rows; ++r) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[r * row + i] = forward_at<Unit>(w, factor, r * in + i, Lane<T>{constants + i, stride});
  }
}

template <class Unit, class T, bool sums>
void backward_plane(const T* __restrict w, const T* __restrict factor, const T* __restrict dy, T* __restrict dw,
                    T* __restrict dfactor, const Run<T>& run, double* __restrict totals, T*) {
  const typename Unit::Constants k(run.constants);
  const int64_t n = run.n;
  T s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3, s4)
  for (int64_t i = 0; i < n; ++i) {
    [[maybe_unused]] const auto g = backward_at<Unit>(w, factor, dy[i], dw, dfactor, i, k);
    if constexpr (sums) {
      CTK_ADD_TERMS(Unit, s0, s1, s2, s3, s4, g.sums);
    }
  }
  if constexpr (sums) {
    const T all[] = {s0, s1, s2, s3, s4};
    for (int j = 0; j < Unit::kSums; ++j) totals[j] += all[j];
  }
}

template <class Unit, class T, int R, bool sums>
void backward_rows(const T* __restrict w, const T* __restrict factor, const T* __restrict dy, T* __restrict dw,
                   T* __restrict dfactor, const Run<T>& run, int64_t first, T* __restrict lanes) {
  const T* __restrict constants = run.constants;
  const int64_t n = run.n, row = run.row, in = in_row<Unit>(run), stride = run.stride;
  T *__restrict l1 = lanes + stride, *__restrict l2 = l1 + stride, *__restrict l3 = l2 + stride, *__restrict l4 = l3 + stride;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    T s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0;
#pragma GCC unroll 4
    for (int64_t r = first; r < first + R; ++r) {
      const Lane<T> k{constants + i, stride};
      [[maybe_unused]] const auto g = backward_at<Unit>(w, factor, dy[r * row + i], dw, dfactor, r * in + i, k);
      if constexpr (sums) {
        CTK_ADD_TERMS(Unit, s0, s1, s2, s3, s4, g.sums);
      }
    }
    if constexpr (sums) {
      const T terms[] = {s0, s1, s2, s3, s4};
      CTK_ADD_TERMS(Unit, lanes[i], l1[i], l2[i], l3[i], l4[i], terms);
    }
  }
}

template <class Unit, class T, bool sums>
void backward_lanes(const T* w, const T* factor, const T* dy, T* dw, T* dfactor, const Run<T>& run, double*, T* lanes) {
  const auto rows = [&]<int R>(int64_t r, std::integral_constant<int, R>) {
    backward_rows<Unit, T, R, sums>(w, factor, dy, dw, dfactor, run, r, lanes);
  };
  int64_t r = 0;
  for (; r + Unit::kRows <= run.rows; r += Unit::kRows) rows(r, std::integral_constant<int, Unit::kRows>{});
  for (; r < run.rows; ++r) rows(r, std::integral_constant<int, 1>{});
}

template <class Op, typename Op::Variant variant, class T, class Math>
constexpr BlockKernels<T> block_kernels() {
  using U = Unit<Op, variant, T, Math>;
  return {U::kSums, {forward_plane<U, T>, forward_lanes<U, T>, forward_plane<U, T>},
          {{backward_plane<U, T, false>, backward_plane<U, T, true>}, {backward_lanes<U, T, false>, backward_lanes<U, T, true>}}};
}

// ---- staging: dtypes and the prologue ------------------------------------------------------------------------------

template <class T>
void copy_in(const void* from, T* to, int64_t n) { memcpy(to, from, n * sizeof(T)); }
template <class T>
void copy_out(const T* from, void* to, int64_t n) { memcpy(to, from, n * sizeof(T)); }

void load_bf16(const void* from, float* __restrict to, int64_t n) {
  const uint16_t* __restrict p = static_cast<const uint16_t*>(from);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = as_float(static_cast<int32_t>(static_cast<uint32_t>(p[i]) << 16));
}

void store_bf16(const float* __restrict from, void* to, int64_t n) {
  uint16_t* __restrict p = static_cast<uint16_t*>(to);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t u = static_cast<uint32_t>(as_int(from[i]));
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    p[i] = static_cast<uint16_t>(from[i] == from[i] ? rounded : 0x7fc0u);
  }
}

// g++ does not vectorise half conversions by itself.
void load_f16(const void* from, float* __restrict to, int64_t n) {
  const uint16_t* p = static_cast<const uint16_t*>(from);
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i))));
#endif
  for (; i < n; ++i) {
    Half h;
    memcpy(&h, p + i, 2);
    to[i] = static_cast<float>(h);
  }
}

void store_f16(const float* __restrict from, void* to, int64_t n) {
  uint16_t* p = static_cast<uint16_t*>(to);
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; ++i) {
    const Half h = static_cast<Half>(from[i]);
    memcpy(p + i, &h, 2);
  }
}

template <class T>
void prologue(const T* __restrict x, const T* __restrict residual, const T* __restrict scale, const T* __restrict shift,
              int64_t step, T* __restrict w, int64_t n) {
  const auto run = [&](auto affine) __attribute__((always_inline)) {
    if (residual) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) w[i] = affine(i) + residual[i];
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) w[i] = affine(i);
    }
  };
  const T a = *scale, b = *shift;
  if (step == 0) run([=](int64_t i) __attribute__((always_inline)) { return fused(a, x[i], b); });
  else run([=](int64_t i) __attribute__((always_inline)) { return fused(scale[i], x[i], shift[i]); });
}

template <class T>
void scaled(const T* __restrict g, const T* __restrict scale, int64_t step, T* __restrict dx, int64_t n) {
  const T a = *scale;
  if (step == 0) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) dx[i] = a * g[i];
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) dx[i] = scale[i] * g[i];
  }
}

template <class T>
void prologue_plane_sums(const T* __restrict g, const T* __restrict x, double* __restrict totals, int64_t n) {
  T s0 = 0, s1 = 0;
#pragma omp simd reduction(+ : s0, s1)
  for (int64_t i = 0; i < n; ++i) {
    s0 += g[i] * x[i];
    s1 += g[i];
  }
  totals[0] += s0;
  totals[1] += s1;
}

template <class T>
void prologue_lane_sums(const T* __restrict g, const T* __restrict x, T* __restrict dscale, T* __restrict dshift, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    dscale[i] += g[i] * x[i];
    dshift[i] += g[i];
  }
}

template <class T>
constexpr Staging<T> staging() {
  Staging<T> s = {{}, {}, prologue<T>, scaled<T>, prologue_plane_sums<T>, prologue_lane_sums<T>};
  const auto set = [&](DType t, auto* load, auto* store) { s.load[static_cast<int>(t)] = load, s.store[static_cast<int>(t)] = store; };
  if constexpr (sizeof(T) == 8) {
    set(DType::kDouble, copy_in<double>, copy_out<double>);
  } else {
    set(DType::kFloat, copy_in<float>, copy_out<float>);
    set(DType::kBFloat16, load_bf16, store_bf16);
    set(DType::kHalf, load_f16, store_f16);
  }
  return s;
}

template <class Op, typename Op::Variant variant>
constexpr void fill(KernelTable& t, Kernel kernel) {
  const int i = static_cast<int>(kernel);
  t.f32[i] = block_kernels<Op, variant, float, Exact>();
  t.f16[i] = block_kernels<Op, variant, float, Fast>();
  t.f64[i] = block_kernels<Op, variant, double, Exact>();
#if defined(__AVX512BW__)
  t.memory[static_cast<int>(DType::kFloat)][i] = avx512::memory_kernels<Op, variant, avx512::Float>();
  t.memory[static_cast<int>(DType::kBFloat16)][i] = avx512::memory_kernels<Op, variant, avx512::BFloat16>();
  t.memory[static_cast<int>(DType::kHalf)][i] = avx512::memory_kernels<Op, variant, avx512::Half>();
#endif
}

constexpr KernelTable make_table() {
  KernelTable t{CTK_STR(CTK_LEVEL), {}, {}, {}, staging<float>(), staging<double>(), {}};
#define CTK_KERNELS(stem, Op, variant) fill<Op, Op::Variant::variant>(t, Kernel::stem);
#include "../ops.def"
  return t;
}

}  // namespace

extern const KernelTable CTK_LEVEL;
constinit const KernelTable CTK_LEVEL = make_table();

}  // namespace ctk::cpu
