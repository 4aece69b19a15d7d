// The block kernels of one SIMD level. The build compiles this file once per level, with that level's flags and with
// CTK_LEVEL naming the table it exports. Everything else has internal linkage: no code of a wide level can be picked by
// the linker for a narrow machine.
#include "block.h"

#include "../ctu.h"
#include "../head_edit.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif
#if defined(__AVX512BW__)
#include "direct_avx512.h"
#endif

#define CTK_STR2(x) #x
#define CTK_STR(x) CTK_STR2(x)

namespace ctk::cpu {
namespace {

template <class T, int N>
struct Uniform {
  T f[N];
  explicit Uniform(const T* p) {
    for (int i = 0; i < N; ++i) f[i] = p[i];
  }
  CTK_HD T operator()(int i) const { return f[i]; }
};

template <class T>
struct Lane {
  const T* p;
  int64_t stride;
  CTK_HD T operator()(int i) const { return p[i * stride]; }
};

// Sums of up to five terms, each by its own name: the compiler keeps no array in vector registers.
#define CTK_ADD_TERMS(Op, s0, s1, s2, s3, s4, g)                     \
  s0 += (g).sums[0];                                                 \
  s1 += (g).sums[1];                                                 \
  if constexpr (Op::kSums > 2) s2 += (g).sums[2], s3 += (g).sums[3]; \
  if constexpr (Op::kSums > 4) s4 += (g).sums[4]

template <class Op, class T>
void forward_uniform(const T* __restrict w, T* __restrict y, const T* consts, int64_t n) {
  const Uniform<T, Op::kFields> k(consts);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = Op::forward(w[i], k);
}

template <class Op, class T>
void forward_lanes(const T* __restrict w, T* __restrict y, const T* __restrict consts, int64_t stride, int64_t rows,
                   int64_t row, int64_t n) {
  for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[r * row + i] = Op::forward(w[r * row + i], Lane<T>{consts + i, stride});
  }
}

template <class Op, class T, bool sums>
void backward_uniform(const T* __restrict w, const T* __restrict dy, T* __restrict dw, const T* consts,
                      double* __restrict totals, int64_t n) {
  const Uniform<T, Op::kFields> k(consts);
  T s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3, s4)
  for (int64_t i = 0; i < n; ++i) {
    const auto g = Op::gradients(w[i], dy[i], k);
    dw[i] = g.w;
    if constexpr (sums) {
      CTK_ADD_TERMS(Op, s0, s1, s2, s3, s4, g);
    }
  }
  if constexpr (sums) {
    const T all[] = {s0, s1, s2, s3, s4};
    for (int j = 0; j < Op::kSums; ++j) totals[j] += all[j];
  }
}

// Rows whose sums of a lane are added up in registers. Ops that do little else than move data gain from it.
template <class Op>
constexpr int kRowsAtOnce = Op::kSums <= 2 ? 4 : 1;

template <class Op, class T, int R, bool sums>
void backward_rows(const T* __restrict w, const T* __restrict dy, T* __restrict dw, const T* __restrict consts,
                   int64_t stride, T* __restrict lanes, int64_t row, int64_t n) {
  T* __restrict l1 = lanes + stride;
  T* __restrict l2 = lanes + 2 * stride;
  T* __restrict l3 = lanes + 3 * stride;
  T* __restrict l4 = lanes + 4 * stride;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    T s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const auto g = Op::gradients(w[r * row + i], dy[r * row + i], Lane<T>{consts + i, stride});
      dw[r * row + i] = g.w;
      if constexpr (sums) {
        CTK_ADD_TERMS(Op, s0, s1, s2, s3, s4, g);
      }
    }
    if constexpr (sums) {
      lanes[i] += s0;
      l1[i] += s1;
      if constexpr (Op::kSums > 2) l2[i] += s2, l3[i] += s3;
      if constexpr (Op::kSums > 4) l4[i] += s4;
    }
  }
}

template <class Op, class T, bool sums>
void backward_lanes(const T* w, const T* dy, T* dw, const T* consts, int64_t stride, T* lanes, int64_t rows, int64_t row,
                    int64_t n) {
  constexpr int R = kRowsAtOnce<Op>;
  int64_t r = 0;
  for (; r + R <= rows; r += R)
    backward_rows<Op, T, R, sums>(w + r * row, dy + r * row, dw + r * row, consts, stride, lanes, row, n);
  for (; r < rows; ++r)
    backward_rows<Op, T, 1, sums>(w + r * row, dy + r * row, dw + r * row, consts, stride, lanes, row, n);
}

template <class Op, class T>
constexpr BlockOps<T> block_ops() {
  return {Op::kFields,
          Op::kSums,
          kRowsAtOnce<Op>,
          forward_uniform<Op, T>,
          forward_lanes<Op, T>,
          {backward_uniform<Op, T, false>, backward_uniform<Op, T, true>},
          {backward_lanes<Op, T, false>, backward_lanes<Op, T, true>}};
}

// ---- staging: dtypes and the prologue ------------------------------------------------------------------------------

template <class T>
void copy_in(const void* from, T* to, int64_t n) {
  memcpy(to, from, n * sizeof(T));
}
template <class T>
void copy_out(const T* from, void* to, int64_t n) {
  memcpy(to, from, n * sizeof(T));
}

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
    _Float16 h;
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
    const _Float16 h = static_cast<_Float16>(from[i]);
    memcpy(p + i, &h, 2);
  }
}

template <class T>
void prologue(const T* __restrict x, const T* __restrict residual, const T* __restrict scale, const T* __restrict shift,
              int64_t step, T* __restrict w, int64_t n) {
  if (step == 0) {
    const T a = *scale, b = *shift;
    if (residual) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) w[i] = fused(a, x[i], b) + residual[i];
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) w[i] = fused(a, x[i], b);
    }
  } else if (residual) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) w[i] = fused(scale[i], x[i], shift[i]) + residual[i];
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) w[i] = fused(scale[i], x[i], shift[i]);
  }
}

template <class T>
void scaled(const T* __restrict g, const T* __restrict scale, int64_t step, T* __restrict dx, int64_t n) {
  if (step == 0) {
    const T a = *scale;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) dx[i] = a * g[i];
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) dx[i] = scale[i] * g[i];
  }
}

template <class T>
void prologue_uniform_sums(const T* __restrict g, const T* __restrict x, double* __restrict totals, int64_t n) {
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
  if constexpr (sizeof(T) == 8)
    return {{nullptr, copy_in<double>, nullptr, nullptr},
            {nullptr, copy_out<double>, nullptr, nullptr},
            prologue<T>, scaled<T>, prologue_uniform_sums<T>, prologue_lane_sums<T>};
  else
    return {{copy_in<float>, nullptr, load_bf16, load_f16},
            {copy_out<float>, nullptr, store_bf16, store_f16},
            prologue<T>, scaled<T>, prologue_uniform_sums<T>, prologue_lane_sums<T>};
}

template <class T, class Math = Exact>
struct OpTable {
  template <CtuKind kind>
  static constexpr BlockOps<T> ctu = block_ops<Ctu<T, kind, Math>, T>();
  static constexpr BlockOps<T> head_edit = block_ops<HeadEdit<T>, T>();
};

// In the order of Kernel.
#define CTK_OPS(...)                                                                                              \
  {                                                                                                               \
    OpTable<__VA_ARGS__>::ctu<CtuKind::kLogistic>, OpTable<__VA_ARGS__>::ctu<CtuKind::kLeaky>,                    \
        OpTable<__VA_ARGS__>::ctu<CtuKind::kRelu6>, OpTable<__VA_ARGS__>::ctu<CtuKind::kGaussian>,                \
        OpTable<__VA_ARGS__>::head_edit                                                                           \
  }

#if defined(__AVX512BW__)
#define CTK_HALF_OPS(format)                                                      \
  {                                                                               \
    direct::direct_ops<direct::format, direct::CtuVectors<direct::FastMath>>(), {}, {}, {},         \
        direct::direct_ops<direct::format, direct::HeadEditVectors>()             \
  }
// In the order of DType.
#define CTK_DIRECT_OPS                                                                   \
  {                                                                                      \
    {direct::direct_ops<direct::Float, direct::CtuVectors<direct::ExactMath>>(), {}, {}, {}, \
     direct::direct_ops<direct::Float, direct::HeadEditVectors>()},                      \
        {}, CTK_HALF_OPS(BFloat16), CTK_HALF_OPS(Half)                                   \
  }
#else
#define CTK_DIRECT_OPS {}
#endif

}  // namespace

extern const BlockTable CTK_LEVEL;
const BlockTable CTK_LEVEL = {CTK_STR(CTK_LEVEL), CTK_OPS(float), CTK_OPS(float, Fast), CTK_OPS(double), staging<float>(),
                              staging<double>(), CTK_DIRECT_OPS};

}  // namespace ctk::cpu
