// What the scalar headers leave to the GPU: storage types, the arithmetic of each, and constants without double precision.
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

// float32: polynomials, as on the CPU. A decay rate is at least kLeastRate, so that its limit is finite and 2^-(rate *
// limit) a subnormal: what lies beyond is flushed by the products it enters, instead of compared.
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

// 16-bit results: exponentials from the approximate unit, which also takes every magnitude.
struct GpuFast : Fast {
  static constexpr bool kUncapped = true;
  static __device__ __forceinline__ float inverse(float x) { return reciprocal(x); }
  static __device__ __forceinline__ float decay(float a, float, const Decay<float>& d) { return power_of_two(-a * d.hi); }
  static __device__ __forceinline__ float bell(float t, float) { return power_of_two(t * t * -0.72134752f); }
  static __device__ __forceinline__ float mills(float t) { return GpuExact::mills(t); }
};

// ---- storage -------------------------------------------------------------------------------------------------------

template <class T>
struct Arithmetic {
  using Compute = float;
  using Math = GpuFast;
};
template <>
struct Arithmetic<float> {
  using Compute = float;
  using Math = GpuExact;
};
template <>
struct Arithmetic<double> {
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
__device__ __forceinline__ double narrowed(double v) {
  return v;
}

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

// V neighbouring values as they lie in memory: one, or 16 bytes of them. Saying that they are global keeps accesses from
// becoming generic ones.
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
// Of V channels, all loads in flight together: what decides the way to the values is the same for all of them.
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

// A bump lower than this is flushed, so that its rate stays finite.
inline constexpr double kLeastWidth = 7.52316384526264e-37;  // 2^-120

// beta and s as unevaluated sums of floats, coeff and 1 - coeff.
struct FloatKnobs {
  float beta, beta_lo, s, s_lo, coeff, coeff1;
};

struct TwoFloats {
  float hi, lo;
};
__device__ __forceinline__ TwoFloats split(double v) {
  const float hi = static_cast<float>(v);
  return {hi, static_cast<float>(v - hi)};
}
__device__ __forceinline__ TwoFloats product(TwoFloats x, TwoFloats y) {
  const float hi = x.hi * y.hi;
  return {hi, fmaf(x.hi, y.lo, fmaf(x.lo, y.hi, fmaf(x.hi, y.hi, -hi)))};
}

__device__ __forceinline__ FloatKnobs narrowed_knobs(const CtuKnobs& k) {
  const TwoFloats beta = split(k.beta), s = split(k.s);
  return {beta.hi, beta.lo, s.hi, s.lo, static_cast<float>(k.coeff), static_cast<float>(k.coeff1)};
}

// Of V channels: from the table where there is one, else of knobs that are no logits.
template <int V>
__device__ __forceinline__ void knobs_of(const Channelwise& a, uint32_t g, const uint32_t (&c)[V], FloatKnobs (&out)[V]) {
  const ParamRef &beta = a.params[kBeta], &coeff = a.params[kCoeff];
  if (a.knobs) {
    const uint32_t channels = a.tiling.channels;
    const int64_t field = int64_t(a.knob_rows) * channels;
    const float* from = a.knobs + int64_t(a.knob_rows == 1 ? 0 : g) * channels;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float* k = from + c[j];
      out[j] = {k[0], k[field], k[2 * field], k[3 * field], k[4 * field], k[5 * field]};
    }
  } else if (beta.is_double || coeff.is_double || a.ctu.eps != 0) {
    double b[V], q[V];
    parameters(beta, g, c, b), parameters(coeff, g, c, q);
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = narrowed_knobs(ctu_knobs(b[j], q[j], false, a.ctu.eps));
  } else {
    float b[V], q[V];
    parameters(beta, g, c, b), parameters(coeff, g, c, q);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float s = 1.f - b[j];
      out[j] = {b[j], 0.f, s, (1.f - s) - b[j], q[j], 1.f - q[j]};  // s_lo: what the subtraction rounded off
    }
  }
}

template <class T>
struct CtuConstants {
  T f[kCtuFields], scale, shift;
  __device__ __forceinline__ T operator()(int field) const {
    if (field == kNegC) return -f[kC];
    return f[field];
  }
};

// The unit of one family member over one storage type, as the skeleton wants it.
template <CtuKind kind, class T>
struct CtuUnit {
  using C = typename Arithmetic<T>::Compute;
  using Math = typename Arithmetic<T>::Math;
  using Op = Ctu<C, kind, Math>;
  using Constants = CtuConstants<C>;
  static constexpr int kParams = kCtuParams;

  // Constants of V channels. kFull: those of the prologue too.
  template <bool kFull, int V>
  static __device__ __forceinline__ void derive(const Channelwise& a, uint32_t g, const uint32_t (&c)[V], Constants (&out)[V]) {
    C slope[V];
    parameters(a.params[kSlopeParam], g, c, slope);
    if constexpr (sizeof(C) == 8) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const CtuKnobs k = ctu_knobs(parameter(a.params[kBeta], g, c[j]), parameter(a.params[kCoeff], g, c[j]), a.ctu.raw, a.ctu.eps);
        Op::derive(k, slope[j], out[j].f, 1);
      }
    } else {
      FloatKnobs knobs[V];
      knobs_of(a, g, c, knobs);
#pragma unroll
      for (int j = 0; j < V; ++j) derive_floats(knobs[j], slope[j], out[j].f);
    }
    if constexpr (kFull) {
      C scale[V], shift[V];
      parameters(a.params[kScaleParam], g, c, scale), parameters(a.params[kShiftParam], g, c, shift);
#pragma unroll
      for (int j = 0; j < V; ++j) out[j].scale = scale[j], out[j].shift = shift[j];
    }
  }

  // As Ctu::derive, in pairs of floats. A unit without a bump has no coefficients.
  static __device__ __forceinline__ void derive_floats(const FloatKnobs& v, float slope, float* f) {
    constexpr float largest = 3.4028234e38f;
    constexpr TwoFloats log2e = {1.44269502162933349609375f, 1.92596299112661746887e-8f};
    const bool smooth = !(v.s <= float(kLeastWidth));  // a NaN is passed on
    const float s = smooth ? v.s : 1.f, s_lo = smooth ? v.s_lo : 0.f;
    TwoFloats u{reciprocal(s), 0.f};
    u.lo = u.hi * fmaf(-s_lo, u.hi, fmaf(-s, u.hi, 1.f));
    TwoFloats t = product({v.beta, v.beta_lo}, u);
    f[kEta] = smooth ? t.hi : 0.f;
    if constexpr (kind != CtuKind::kGaussian) t = product(t, log2e), u = product(u, log2e);
    if constexpr (Math::kUncapped) {  // infinity decays to 0 at beta = 0 too
      t.hi = t.hi < 1.4e-45f ? 1.4e-45f : t.hi;
      f[kTLimit] = f[kULimit] = kind == CtuKind::kRelu6 ? Op::kFlat : largest;
    } else if constexpr (kind == CtuKind::kGaussian) {
      f[kTLimit] = fminf(13.16f * reciprocal(t.hi), largest), f[kULimit] = fminf(13.16f * reciprocal(u.hi), largest);
    } else {
      t.hi = t.hi < GpuExact::kLeastRate ? GpuExact::kLeastRate : t.hi;
      f[kTLimit] = GpuExact::kGone * reciprocal(t.hi), f[kULimit] = GpuExact::kGone * reciprocal(u.hi);
      if constexpr (kind == CtuKind::kRelu6) f[kTLimit] = capped(f[kTLimit], Op::kFlat);
    }
    f[kTHi] = t.hi, f[kTLo] = t.lo, f[kUHi] = u.hi, f[kULo] = u.lo;
    const float kept = smooth ? 1.f : 0.f;  // as factors: a NaN is kept
    f[kC] = kept * v.coeff, f[kC1] = kept * v.coeff1, f[kC1S] = kept * v.coeff1 * s;
    f[kSlope] = slope, f[kReach] = Op::reach(1.f - slope);
  }

  static __device__ void finish(const CtuStatic& ctu, const double* p, const double* sums, double* grads) {
    finish_ctu(ctu, p, sums, grads);
    // Without a bump the knobs have no effect; NaN stays NaN.
    if (sizeof(C) == 4 && ctu_knobs(p[kBeta], p[kCoeff], ctu.raw, ctu.eps).s <= kLeastWidth) grads[kBeta] *= 0.0, grads[kCoeff] *= 0.0;
  }
};

template <class T>
struct HeadEditUnit {
  using C = typename Arithmetic<T>::Compute;
  using Op = HeadEdit<C>;
  static constexpr int kParams = kHeadEditParams;
  struct Constants {
    C f[kHeadEditFields];
    __device__ __forceinline__ C operator()(int field) const { return f[field]; }
  };

  template <bool, int V>
  static __device__ __forceinline__ void derive(const Channelwise& a, uint32_t g, const uint32_t (&c)[V], Constants (&out)[V]) {
    C m[V], add[V], gate_m[V], gate_a[V];
    parameters(a.params[kM], g, c, m), parameters(a.params[kGateM], g, c, gate_m);
    parameters(a.params[kA], g, c, add), parameters(a.params[kGateA], g, c, gate_a);
#pragma unroll
    for (int j = 0; j < V; ++j) out[j].f[kScale] = fused(gate_m[j], m[j], C(1)), out[j].f[kOffset] = gate_a[j] * add[j];
  }

  static __device__ void finish(const CtuStatic&, const double* p, const double* sums, double* grads) {
    finish_head_edit(p, sums, grads);
  }
};

}  // namespace ctk::cuda
