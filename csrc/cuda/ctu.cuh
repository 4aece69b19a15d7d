// The CT unit's constants in pairs of floats: double precision is slow on most GPUs.
#pragma once
#include "math.cuh"

namespace ctk::cuda {

// A narrower bump is flushed to none, so that its rate stays finite.
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

__device__ __forceinline__ FloatKnobs float_knobs(const CtuKnobs& k) {
  const TwoFloats beta = split(k.beta), s = split(k.s);
  return {beta.hi, beta.lo, s.hi, s.lo, static_cast<float>(k.coeff), static_cast<float>(k.coeff1)};
}

// The knobs of V channels: from the table if there is one (for logits), else computed here.
template <int V, class Op>
__device__ __forceinline__ void knobs_of(const Channelwise<Op>& a, uint32_t g, const uint32_t (&c)[V], FloatKnobs (&out)[V]) {
  const ParamRef &beta = a.params[CtuOp::kBeta], &coeff = a.params[CtuOp::kCoeff];
  if (a.table) {
    const uint32_t channels = a.tiling.channels;
    const int64_t field = int64_t(a.table_rows) * channels;
    const float* from = a.table + int64_t(a.table_rows == 1 ? 0 : g) * channels;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float* k = from + c[j];
      out[j] = {k[0], k[field], k[2 * field], k[3 * field], k[4 * field], k[5 * field]};
    }
  } else if (beta.is_double || coeff.is_double || a.attributes.eps != 0) {
    double b[V], q[V];
    parameters(beta, g, c, b), parameters(coeff, g, c, q);
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = float_knobs(ctu_knobs(b[j], q[j], false, a.attributes.eps));
  } else {
    float b[V], q[V];
    parameters(beta, g, c, b), parameters(coeff, g, c, q);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float s = 1.f - b[j];
      out[j] = {b[j], 0.f, s, (1.f - s) - b[j], q[j], 1.f - q[j]};  // s_lo: the rounding error of the subtraction
    }
  }
}

template <class Op>
struct OnGpu<Op, float, std::enable_if_t<std::is_base_of_v<CtuOp, Op>>> {
  struct Constants : cuda::Constants<Op, float> {
    __device__ __forceinline__ float operator()(int i) const { return i == CtuOp::kNegC ? -this->k[CtuOp::kC] : this->k[i]; }
  };

  template <CtuOp::Variant kind, class Math, int V>
  static __device__ __forceinline__ void precompute(const Channelwise<Op>& a, uint32_t g, const uint32_t (&c)[V], Constants (&out)[V]) {
    double slope[V];  // a float would lose digits of 1 - slope, and its sign
    FloatKnobs knobs[V];
    parameters(a.params[CtuOp::kSlope], g, c, slope);
    knobs_of(a, g, c, knobs);
#pragma unroll
    for (int j = 0; j < V; ++j) precompute<kind, Math>(knobs[j], slope[j], out[j].k);
  }

  // CtuOp::precompute in pairs of floats. Without a bump, the coefficients are 0.
  template <CtuOp::Variant kind, class Math>
  static __device__ __forceinline__ void precompute(const FloatKnobs& v, double slope, float* k) {
    using Rates = CtuRates<float>;
    constexpr float largest = 3.4028234e38f;
    constexpr TwoFloats log2e = {1.44269502162933349609375f, 1.92596299112661746887e-8f};
    const bool smooth = !(v.s <= float(kLeastWidth));  // true for NaN
    const float s = smooth ? v.s : 1.f, s_lo = smooth ? v.s_lo : 0.f;
    TwoFloats u{reciprocal(s), 0.f};
    u.lo = u.hi * fmaf(-s_lo, u.hi, fmaf(-s, u.hi, 1.f));
    TwoFloats t = product({v.beta, v.beta_lo}, u);
    k[CtuOp::kEta] = smooth ? t.hi : 0.f;
    if constexpr (!CtuOp::has_tails(kind)) t = product(t, log2e), u = product(u, log2e);
    if constexpr (Math::kUncapped) {  // a rate above 0, so that infinity decays to 0 at beta = 0 too
      t.hi = t.hi < 1.4e-45f ? 1.4e-45f : t.hi;
      k[CtuOp::kTLimit] = k[CtuOp::kULimit] = kind == CtuOp::Variant::kRelu6 ? Rates::kFlat : largest;
    } else if constexpr (CtuOp::has_tails(kind)) {
      constexpr float end = kind == CtuOp::Variant::kTanh ? Rates::kTanhEnd : Rates::kGaussianEnd;
      k[CtuOp::kTLimit] = fminf(end * reciprocal(t.hi), largest);
      k[CtuOp::kULimit] = fminf(Rates::kGaussianEnd * reciprocal(u.hi), largest);
    } else {
      t.hi = t.hi < GpuExact::kLeastRate ? GpuExact::kLeastRate : t.hi;
      k[CtuOp::kTLimit] = GpuExact::kGone * reciprocal(t.hi), k[CtuOp::kULimit] = GpuExact::kGone * reciprocal(u.hi);
      if constexpr (kind == CtuOp::Variant::kRelu6) k[CtuOp::kTLimit] = capped(k[CtuOp::kTLimit], Rates::kFlat);
    }
    k[CtuOp::kTHi] = t.hi, k[CtuOp::kTLo] = t.lo, k[CtuOp::kUHi] = u.hi, k[CtuOp::kULo] = u.lo;
    const float kept = smooth ? 1.f : 0.f;  // factors, so that NaN stays NaN
    k[CtuOp::kC] = kept * v.coeff, k[CtuOp::kC1] = kept * v.coeff1, k[CtuOp::kC1S] = kept * v.coeff1 * s;
    k[CtuOp::kNear] = static_cast<float>(slope), k[CtuOp::kReach] = Rates::reach(static_cast<float>(1.0 - slope));
  }

  // Without a bump, beta and coeff have no effect; NaN stays NaN.
  static __device__ void parameter_gradients(const CtuOp::Attributes& a, const double* p, const double* sums, double* grads) {
    CtuOp::parameter_gradients(a, p, sums, grads);
    const double s = ctu_knobs(p[CtuOp::kBeta], p[CtuOp::kCoeff], a.raw, a.eps).s;
    if (s <= kLeastWidth) grads[CtuOp::kBeta] *= 0.0, grads[CtuOp::kCoeff] *= 0.0;
  }
};

}  // namespace ctk::cuda
