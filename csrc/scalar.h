// Scalar functions shared by all ops: g++ vectorises them for the CPU, nvcc compiles them for the GPU. No branches, and no
// library calls for float, so that a loop over them becomes straight SIMD code.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

// CTK_HD: per element, always inlined. CTK_ONCE: per channel.
#if defined(__CUDACC__)
#define CTK_HD __host__ __device__ __forceinline__
#define CTK_ONCE __host__ __device__ inline
#else
#define CTK_HD inline __attribute__((always_inline))
#define CTK_ONCE inline
#endif
#define CTK_EXPORT extern "C" __attribute__((visibility("default")))

namespace ctk {

// e^(-rate a) for a >= 0. hi + lo is the rate times log2(e), as an unevaluated sum: exponents in the hundreds keep full
// precision. Beyond `limit` the result is 0; with a negative limit, everywhere.
template <class T>
struct Decay {
  T hi, lo, limit;
};

template <class T>
CTK_ONCE Decay<T> make_decay(double rate);  // any rate >= 0, +inf included

template <>
CTK_ONCE Decay<float> make_decay<float>(double rate) {
  constexpr double log2e = 1.4426950408889634;
  const double r = rate * log2e;
  if (!(r < 3e38)) return {0.f, 0.f, -1.f};
  const float hi = static_cast<float>(r);
  const double limit = 125.0 / r;  // 2^-125 is the smallest power of two that rounding cannot make subnormal
  return {hi, static_cast<float>(r - hi), limit < 3.4e38 ? static_cast<float>(limit) : std::numeric_limits<float>::max()};
}

template <>
CTK_ONCE Decay<double> make_decay<double>(double rate) {
  if (!(rate < 1e308)) return {0.0, 0.0, -1.0};
  const double limit = 700.0 / rate;
  return {rate, 0.0, limit < 1.7e308 ? limit : std::numeric_limits<double>::max()};
}

// sigma(r) and sigma(-r), both to full precision.
struct Sigmoids {
  double of, of_negative;
};
CTK_ONCE Sigmoids sigmoids(double r) {
  const double e = exp(-fabs(r)), large = 1.0 / (1.0 + e), small = e * large;
  return r < 0 ? Sigmoids{small, large} : Sigmoids{large, small};
}

// min(a, limit); NaN stays NaN.
template <class T>
CTK_HD T capped(T a, T limit) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 4) {  // one instruction; compare and select are two
    float r;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(limit));
    return r;
  }
#endif
  return limit < a ? limit : a;
}

CTK_HD float as_float(int32_t i) {
  float f;
  memcpy(&f, &i, 4);
  return f;
}
CTK_HD int32_t as_int(float f) {
  int32_t i;
  memcpy(&i, &f, 4);
  return i;
}

constexpr float kRoundMagic = 12582912.f;  // 1.5 * 2^23: x + magic rounds x to an integer

// p 2^k, where k is the integer that adding kRoundMagic left in z's low bits.
CTK_HD float scale_by_power(float p, float z) {
  return as_float(static_cast<int32_t>(static_cast<uint32_t>(as_int(p)) + (static_cast<uint32_t>(as_int(z)) << 23)));
}

// A polynomial with coefficients C::k, highest power first.
template <class C>
inline constexpr int kTerms = sizeof(C::k) / sizeof(float);
template <class C, int i = 0>
CTK_HD float horner(float x, float p = 0.f) {
  if constexpr (i == kTerms<C>) {
    return p;
  } else {
    constexpr float c = C::k[i];
    return horner<C, i + 1>(x, i == 0 ? c : fmaf(p, x, c));
  }
}

// e^(-(t + t_lo)^2 / 2).
template <class Math>
CTK_HD float bell_by(float t, float t_lo) {
  const float y = t * t, y_lo = fmaf(2.f * t, t_lo, fmaf(t, t, -y));
  constexpr float half_log2e = 0.72134752f, half_log2e_lo = 9.6298149e-9f;
  const float z = fmaf(-y, half_log2e, kRoundMagic);
  float f = fmaf(-y, half_log2e, kRoundMagic - z);
  f = fmaf(-y, half_log2e_lo, f);
  f = fmaf(-y_lo, half_log2e, f);
  return scale_by_power(Math::exp2_fraction(f), z);
}

// The gate of GELU's tanh approximation: (1 + tanh(sqrt(2 / pi) (t + 0.044715 t^3))) / 2 = 1 / (1 + e^-g), g = kLinear t + kCubic t^3.
struct TanhGate {
  static constexpr double kLinear = 1.5957691216057308, kCubic = 0.07135481627260025;

  // The coefficients times log2(e), each as a sum of two floats. `linear` has 18 fractional bits, so that subtracting it from
  // linear + cubic t^2 is exact.
  static constexpr float linear = 2.30220794677734375f, linear_lo = 2.5136697e-7f, cubic = 0.10294324f, cubic_lo = -2.0161985e-9f;
};

// e^-g at t + t_lo, for t in [0, 10].
template <class Math>
CTK_HD float tanh_gate_decay_by(float t, float t_lo) {
  using G = TanhGate;
  const float y = t * t, y_lo = fmaf(t, t, -y), m = fmaf(G::cubic, y, G::linear);
  const float m_lo = fmaf(G::cubic, y_lo, fmaf(G::cubic_lo, y, fmaf(G::cubic, y, G::linear - m) + G::linear_lo));
  const float z = fmaf(-t, m, kRoundMagic);
  float f = fmaf(-t, m, kRoundMagic - z);
  f = fmaf(-t, m_lo, f);
  f = fmaf(-t_lo, fmaf(3.f * G::cubic, y, G::linear), f);
  return scale_by_power(Math::exp2_fraction(f), z);
}

// Transcendental functions in two precisions. Exact: for float and double results. Fast: for results rounded to 16 bits; 1e-4
// relative, a fraction of half an ulp of the result.
struct Exact {
  static constexpr bool kUncapped = false;  // true: decays have no limit, and products start from q so that inf * 0 cannot occur
  template <class T>
  static CTK_HD T inverse(T x) { return T(1) / x; }
  template <class T>
  static CTK_HD T times(T x, T y) { return x * y; }

  // 2^f on [-1/2, 1/2], 8e-8 relative.
  struct Exp2 {
    static constexpr float k[] = {0.00132764727275f, 0.00967554132619f, 0.0555071327119f, 0.240221197242f, 0.693146967066f, 1.00000007165f};
  };
  static CTK_HD float exp2_fraction(float f) { return horner<Exp2>(f); }

  // e^(-rate a). a: the magnitude, ac: capped(a, d.limit).
  static CTK_HD float decay(float a, float ac, const Decay<float>& d) {
    const float z = fmaf(-ac, d.hi, kRoundMagic);
    float f = fmaf(-ac, d.hi, kRoundMagic - z);
    f = fmaf(-ac, d.lo, f);
    const float e = scale_by_power(exp2_fraction(f), z);
    return a > d.limit ? 0.f : e;
  }
  static CTK_HD double decay(double a, double ac, const Decay<double>& d) {
    const double e = exp(-ac * d.hi);
    return a > d.limit ? 0.0 : e;
  }

  static CTK_HD float bell(float t, float t_lo) { return bell_by<Exact>(t, t_lo); }
  static CTK_HD float tanh_gate_decay(float t, float t_lo) { return tanh_gate_decay_by<Exact>(t, t_lo); }

  // log(1 + e) / e on [0, 1], 2e-7 relative.
  struct Log1p {
    static constexpr float k[] = {-0.00853920997913f, 0.0440896366184f, -0.107681719451f, 0.177452418669f,
                                  -0.24495462964f,    0.332754797946f,  -0.499974053971f, 0.999999805667f};
  };
  static CTK_HD float log1p_slope(float e) { return horner<Log1p>(e); }
  static CTK_HD float log1p_unit(float e) { return log1p_slope(e) * e; }
  static CTK_HD double log1p_unit(double e) { return log1p(e); }

  // Phi(-t) / e^(-t^2/2) for t in [0, 13.2] (half the scaled complementary error function), 4e-8 relative.
  static CTK_HD float mills(float t) { return mills_at(1.f / fmaf(0.35f, t, 1.f)); }
  static CTK_HD float mills_at(float v) { return horner<Mills>(v) * v; }
  struct Mills {
    static constexpr float k[] = {-0.0291206648984f, 0.143846442622f, -0.255450152319f, 0.158865701548f, -0.0228922507591f,
                                  0.105413403751f,   0.119857536284f, 0.139858354813f,  0.139621613095f};
  };
};

struct Fast : Exact {
  struct Exp2 {  // 8e-5
    static constexpr float k[] = {0.0551716693023f, 0.242611122324f, 0.693260985408f, 0.99992807352f};
  };
  static CTK_HD float exp2_fraction(float f) { return horner<Exp2>(f); }

  static CTK_HD float decay(float a, float ac, const Decay<float>& d) {
    const float z = fmaf(-ac, d.hi, kRoundMagic);
    const float f = fmaf(-ac, d.hi, kRoundMagic - z);
    const float e = scale_by_power(exp2_fraction(f), z);
    return a > d.limit ? 0.f : e;
  }

  static CTK_HD float bell(float t, float t_lo) { return bell_by<Fast>(t, t_lo); }
  static CTK_HD float tanh_gate_decay(float t, float) {
    const float m = fmaf(TanhGate::cubic, t * t, TanhGate::linear), z = fmaf(-t, m, kRoundMagic);
    return scale_by_power(exp2_fraction(fmaf(-t, m, kRoundMagic - z)), z);
  }

  struct Log1p {  // 6e-5
    static constexpr float k[] = {0.041347300758f, -0.157427203911f, 0.306300927591f, -0.496977805093f, 0.999943277947f};
  };
  static CTK_HD float log1p_unit(float e) { return horner<Log1p>(e) * e; }
};

CTK_HD float magnitude(float x) { return fabsf(x); }
CTK_HD double magnitude(double x) { return fabs(x); }
CTK_HD float fused(float a, float b, float c) { return fmaf(a, b, c); }
CTK_HD double fused(double a, double b, double c) { return fma(a, b, c); }

}  // namespace ctk
