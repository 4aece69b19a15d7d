// The GPU's part of the arithmetic: transcendental functions, storage types, memory accesses, and the constants of a channel.
#pragma once
#include <type_traits>

#include "args.h"

namespace ctk::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

__device__ __forceinline__ float reciprocal(float x) {  // 1 ulp; an IEEE division is a subroutine call
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
__device__ __forceinline__ float power_of_two(float x) {  // 2 ulp
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
__device__ __forceinline__ float flushed_product(float x, float y) {  // subnormals to 0
  float r;
  asm("mul.ftz.f32 %0, %1, %2;" : "=f"(r) : "f"(x), "f"(y));
  return r;
}

// For float: polynomials, as on the CPU. A decay rate is at least kLeastRate, so that its limit is finite and 2^-(rate * limit)
// subnormal: products flush values beyond the limit to 0, which saves the comparison.
struct GpuExact : Exact {
  static constexpr float kLeastRate = 3.7323e-37f, kGone = 126.99f;  // kGone / kLeastRate < FLT_MAX
  static __device__ __forceinline__ float inverse(float x) { return reciprocal(x); }
  static __device__ __forceinline__ float decay(float, float ac, const Decay<float>& d) {
    const float z = fmaf(-ac, d.hi, kRoundMagic);
    const float f = fmaf(-ac, d.lo, fmaf(-ac, d.hi, kRoundMagic - z));
    return scale_by_power(exp2_fraction(f), z);
  }
  static __device__ __forceinline__ float times(float x, float y) { return flushed_product(x, y); }
  static __device__ __forceinline__ float log1p_unit(float e) { return flushed_product(log1p_slope(e), e); }
  static __device__ __forceinline__ float mills(float t) { return mills_at(reciprocal(fmaf(0.35f, t, 1.f))); }
};

// For 16-bit results: approximate exponentials (ex2.approx), which accept every magnitude.
struct GpuFast : Fast {
  static constexpr bool kUncapped = true;
  static __device__ __forceinline__ float inverse(float x) { return reciprocal(x); }
  static __device__ __forceinline__ float decay(float a, float, const Decay<float>& d) { return power_of_two(-a * d.hi); }
  static __device__ __forceinline__ float bell(float t, float) { return power_of_two(t * t * -0.72134752f); }
  static __device__ __forceinline__ float tanh_gate_decay(float t, float) {
    return power_of_two(-t * fmaf(TanhGate::cubic, t * t, TanhGate::linear));
  }
  static __device__ __forceinline__ float mills(float t) { return GpuExact::mills(t); }
};

// ---- storage -------------------------------------------------------------------------------------------------------

template <class T>
struct Storage {
  using Compute = float;
  using Math = GpuFast;
};
template <>
struct Storage<float> {
  using Compute = float;
  using Math = GpuExact;
};
template <>
struct Storage<double> {
  using Compute = double;
  using Math = Exact;
};

__device__ __forceinline__ float widened(float v) { return v; }
__device__ __forceinline__ double widened(double v) { return v; }
__device__ __forceinline__ float widened(BFloat16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
__device__ __forceinline__ float widened(Half v) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v.bits));
  return r;
}
template <class T>
__device__ __forceinline__ T narrowed(float v) {
  if constexpr (sizeof(T) == 4) {
    return v;
  } else {
    T r;
    if constexpr (std::is_same_v<T, Half>) asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
    else asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
    return r;
  }
}
template <class T>
__device__ __forceinline__ double narrowed(double v) { return v; }

__device__ __forceinline__ void unpack_pair(BFloat16, uint32_t w, float* out) {
  out[0] = __uint_as_float(w << 16), out[1] = __uint_as_float(w & 0xffff0000u);
}
__device__ __forceinline__ void unpack_pair(Half, uint32_t w, float* out) {
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(out[0]), "=f"(out[1]) : "r"(w));
}
__device__ __forceinline__ uint32_t pack(BFloat16, const float* in) {
  uint32_t w;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(in[1]), "f"(in[0]));
  return w;
}
__device__ __forceinline__ uint32_t pack(Half, const float* in) {
  uint32_t w;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(in[1]), "f"(in[0]));
  return w;
}

// V neighbouring values as stored: one, or 16 bytes of them. Assuming global memory keeps accesses from becoming generic.
template <class T, int V>
struct Bits {
  using Word = std::conditional_t<V == 1, T, uint4>;
  Word word;
};
template <class T, int V>
__device__ __forceinline__ Bits<T, V> fetch(const void* from, int64_t at) {
  const T* p = static_cast<const T*>(from) + at;
  __builtin_assume(__isGlobal(p));
  return {*reinterpret_cast<const typename Bits<T, V>::Word*>(p)};
}
template <class T, int V, class C>
__device__ __forceinline__ void unpack(const Bits<T, V>& bits, C* out) {
  const auto& v = bits.word;
  if constexpr (V == 1) {
    out[0] = widened(v);
  } else if constexpr (sizeof(T) == 8) {
    out[0] = __hiloint2double(v.y, v.x), out[1] = __hiloint2double(v.w, v.z);
  } else if constexpr (sizeof(T) == 4) {
    out[0] = __uint_as_float(v.x), out[1] = __uint_as_float(v.y), out[2] = __uint_as_float(v.z), out[3] = __uint_as_float(v.w);
  } else {
    unpack_pair(T{}, v.x, out), unpack_pair(T{}, v.y, out + 2), unpack_pair(T{}, v.z, out + 4), unpack_pair(T{}, v.w, out + 6);
  }
}
template <class T, int V, class C>
__device__ __forceinline__ void store(void* to, int64_t at, const C* in) {
  T* p = static_cast<T*>(to) + at;
  __builtin_assume(__isGlobal(p));
  if constexpr (V == 1) *p = narrowed<T>(in[0]);
  else if constexpr (sizeof(T) == 8) *reinterpret_cast<double2*>(p) = make_double2(in[0], in[1]);
  else if constexpr (sizeof(T) == 4) *reinterpret_cast<float4*>(p) = make_float4(in[0], in[1], in[2], in[3]);
  else *reinterpret_cast<uint4*>(p) = make_uint4(pack(T{}, in), pack(T{}, in + 2), pack(T{}, in + 4), pack(T{}, in + 6));
}

// ---- parameters and constants --------------------------------------------------------------------------------------

__device__ __forceinline__ double parameter(const ParamRef& p, uint32_t g, uint32_t c) {
  if (!p.data) return p.fallback;
  const int64_t i = int64_t(p.rows == 1 ? 0 : g % p.rows) * p.count + (p.run == 1 ? c : c / p.run);
  return p.is_double ? static_cast<const double*>(p.data)[i] : double(static_cast<const float*>(p.data)[i]);
}
// Loads a parameter for V channels; the branches are taken once, so that all V loads overlap.
template <class C, int V>
__device__ __forceinline__ void parameters(const ParamRef& p, uint32_t g, const uint32_t (&c)[V], C (&out)[V]) {
  const auto read = [&](const auto* from, const auto& at) {
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = static_cast<C>(from[at(c[j])]);
  };
  const auto find = [&](const auto& at) {
    const int64_t row = int64_t(p.rows == 1 ? 0 : g % p.rows) * p.count;
    if (p.is_double) read(static_cast<const double*>(p.data) + row, at);
    else read(static_cast<const float*>(p.data) + row, at);
  };
  if (!p.data) {
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = static_cast<C>(p.fallback);
  } else if (p.run == 1) {
    find([](uint32_t channel) { return channel; });
  } else {
    find([&](uint32_t channel) { return channel / p.run; });
  }
}

// An op's constants of one channel.
template <class Op, class C>
struct Constants {
  C k[Op::kConstants], scale, shift;
  __device__ __forceinline__ C operator()(int i) const { return k[i]; }
};

// Computes constants from parameters, and gradients from sums. C: the type of the arithmetic. ctu.cuh specialises it to avoid
// double precision.
template <class Op, class C, class = void>
struct OnGpu {
  using Constants = cuda::Constants<Op, C>;

  // Of V channels.
  template <typename Op::Variant, class Math, int V>
  static __device__ __forceinline__ void precompute(const Channelwise<Op>& a, uint32_t g, const uint32_t (&c)[V], Constants (&out)[V]) {
    C p[Op::kParams][V];
#pragma unroll
    for (int i = 0; i < Op::kParams; ++i) parameters(a.params[i], g, c, p[i]);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      C own[Op::kParams];
#pragma unroll
      for (int i = 0; i < Op::kParams; ++i) own[i] = p[i][j];
      Op::precompute(a.attributes, own, out[j].k);
    }
  }

  static __device__ void parameter_gradients(const typename Op::Attributes& attributes, const double* p, const double* sums, double* grads) {
    Op::parameter_gradients(attributes, p, sums, grads);
  }
};

}  // namespace ctk::cuda
