// The CT unit: phi(w) = relu(w) + delta(|w|), where delta is a bump of height (1 - c) s ln 2 that vanishes away from 0. With
// h = -delta', phi'(w) = w > 0 ? 1 - h(|w|) : h(|w|). Everything below is a function of a = |w| alone, nothing cancels, and
// at beta = 1 the bump is exactly 0: the unit is the plain activation, bit for bit. Derivation and error bounds:
// ctkernels/ops/ctu/README.md.
#pragma once
#include "op.h"

namespace ctk {

// beta, coeff, s = 1 - beta (+ eps) and coeff1 = 1 - coeff, from the parameters or from logits (raw). From a logit, s and coeff1
// have all their digits; 1 minus a sigmoid near 1 has none.
struct CtuKnobs {
  double beta, s, coeff, coeff1, dbeta, dcoeff;  // the last two: derivatives of beta and coeff by their parameters
};

CTK_ONCE CtuKnobs ctu_knobs(double beta, double coeff, bool raw, double eps) {
  if (!raw) return {beta, (1.0 - beta) + eps, coeff, 1.0 - coeff, 1.0, 1.0};
  const Sigmoids b = sigmoids(beta), c = sigmoids(coeff);
  return {b.of, b.of_negative + eps, c.of, c.of_negative, b.of * b.of_negative, c.of * c.of_negative};
}

template <class T>
struct CtuRates {
  // From here on, w - 6 equals w and the two bumps of relu6 cancel. Its square is finite.
  static constexpr T kFlat = 1152921504606846976.0;  // 2^60

  // 1 - slope, but not 0 at slope 1, so that infinity stays infinite.
  static CTK_ONCE T reach(T r) { return r == T(0) ? std::numeric_limits<T>::denorm_min() : r; }

  // Decay of a tail, a function of t: the rate is t's own, and the limit is where e^(-t^2/2), or the tanh gate, falls to 2^-125
  // (double: e^-700).
  static constexpr T kGaussianEnd = sizeof(T) == 4 ? 13.16 : 37.0, kTanhEnd = sizeof(T) == 4 ? 9.97 : 21.05;
  static CTK_ONCE Decay<T> tail(double rate, T end) {
    if (!(rate < (sizeof(T) == 4 ? 3e38 : 1e308))) return {T(0), T(0), T(-1)};
    const T hi = static_cast<T>(rate);
    const double limit = double(end) / rate, top = std::numeric_limits<T>::max();
    return {hi, static_cast<T>(rate - hi), static_cast<T>(limit < top ? limit : top)};
  }
};

struct CtuOp : SimpleOp {
  enum class Variant : int { kLogistic = 0, kLeaky = 1, kRelu6 = 2, kGaussian = 3, kTanh = 4 };  // as in ctkernels/ops/ctu/op.py
  struct Attributes {
    Variant kind;
    bool raw;
    double eps;
  };
  static constexpr std::array kAttributes{"kind", "raw", "eps"};
  static Attributes attributes(int64_t kind, bool raw, double eps) { return {static_cast<Variant>(kind), raw, eps}; }
  static Variant variant(const Attributes& a) { return a.kind; }
  // Whether a member has the branches of GELU: c w S(t) + (1 - c) s (u Phi(u) + phi(u)), S = Phi or its tanh approximation.
  static CTK_HD constexpr bool has_tails(Variant kind) { return kind == Variant::kGaussian || kind == Variant::kTanh; }

  enum Param : int { kBeta, kCoeff, kSlope, kParams };
  static constexpr Parameter kParameters[] = {{"beta"}, {"coeff"}, {"slope", 0.0}};
  static constexpr bool kPrologue = true, kMemoryBound = false;
  static constexpr int64_t kParallelChannels = 256;
  // With logits, a kernel of its own computes the sigmoids: in double, they would cost every block of a GPU too much.
  static constexpr int kTable = 6;
  static bool needs_table(const Attributes& a) { return a.raw; }

  enum Constant : int {
    kTHi, kTLo, kTLimit,   // decay rate of the SiLU branch: t = beta a / s
    kUHi, kULo, kULimit,   // decay rate of the softplus branch: u = a / s
    kC, kC1, kNegC, kC1S,  // coeff, 1 - coeff, -coeff, (1 - coeff) s
    kEta,                  // beta / s
    kNear, kReach,         // leaky only: slope, 1 - slope
    kConstants
  };
  // Sums of dy times: a^2 q (1 - q) and a q of the SiLU branch; log(1 + e^-u) and a q of the softplus branch; dphi/dslope (leaky
  // only). For members with tails: a^2 density and a tail of the first branch; density and a tail of the second.
  enum Sum : int { kSumSquare, kSumT, kSumPeak, kSumU, kSumSlope, kSums };

  template <class T>
  static CTK_ONCE void precompute(const Attributes& a, const double* p, T* k) {
    const CtuKnobs v = ctu_knobs(p[kBeta], p[kCoeff], a.raw, a.eps);
    const double inv_s = v.s > 0 ? 1.0 / v.s : std::numeric_limits<double>::infinity();
    const double eta = v.beta == 0 ? 0.0 : v.beta * inv_s;
    Decay<T> t, u;
    if (has_tails(a.kind)) {
      using Rates = CtuRates<T>;
      t = Rates::tail(v.s > 0 ? eta : inv_s, a.kind == Variant::kTanh ? Rates::kTanhEnd : Rates::kGaussianEnd);
      u = Rates::tail(inv_s, Rates::kGaussianEnd);
    } else {
      t = make_decay<T>(v.s > 0 ? eta : inv_s), u = make_decay<T>(inv_s);
    }
    if (a.kind == Variant::kRelu6) t.limit = capped(t.limit, CtuRates<T>::kFlat);
    const bool smooth = t.limit >= 0 && u.limit >= 0;
    // Without a bump, rates do not depend on s: this propagates a NaN in s.
    const double coeff = v.coeff + v.s * 0.0, coeff1 = v.coeff1 + v.s * 0.0;
    k[kTHi] = t.hi, k[kTLo] = t.lo, k[kTLimit] = t.limit;
    k[kUHi] = u.hi, k[kULo] = u.lo, k[kULimit] = u.limit;
    k[kC] = static_cast<T>(coeff), k[kC1] = static_cast<T>(coeff1), k[kNegC] = static_cast<T>(-coeff);
    k[kC1S] = static_cast<T>(coeff1 * v.s);
    k[kEta] = static_cast<T>(smooth ? eta : 0.0);
    k[kNear] = static_cast<T>(p[kSlope]), k[kReach] = CtuRates<T>::reach(static_cast<T>(1.0 - p[kSlope]));
  }

  static CTK_ONCE void parameter_gradients(const Attributes& a, const double* p, const double* sums, double* grads) {
    const CtuKnobs v = ctu_knobs(p[kBeta], p[kCoeff], a.raw, a.eps);
    const double inv_s = v.s < std::numeric_limits<double>::min() ? 0.0 : 1.0 / v.s;  // NaN stays NaN
    const double silu = v.coeff * (1.0 + a.eps) * (inv_s * (inv_s * sums[kSumSquare]));
    double beta, coeff;
    if (has_tails(a.kind)) {
      beta = silu - v.coeff1 * sums[kSumPeak];
      coeff = -(sums[kSumT] + v.s * sums[kSumPeak] - sums[kSumU]);
    } else {
      beta = silu - v.coeff1 * (sums[kSumPeak] + inv_s * sums[kSumU]);
      coeff = -(sums[kSumT] + v.s * sums[kSumPeak]);
    }
    const double sign = a.kind == Variant::kLeaky && p[kSlope] > 1.0 ? -1.0 : 1.0;
    grads[kBeta] = sign * beta * v.dbeta;
    grads[kCoeff] = sign * coeff * v.dcoeff;
    grads[kSlope] = sums[kSumSlope];
  }

  template <Variant kind, class T, class Math>
  struct Arithmetic;
};

template <CtuOp::Variant kind, class T, class Math>
struct CtuOp::Arithmetic {
  using Gradients = Terms<T, kind == Variant::kLeaky ? kSums : kSumSlope>;

  template <class K>
  static CTK_HD T forward(T w, const K& k) {
    const T a = magnitude(w);
    if constexpr (kind == Variant::kRelu6) {
      const T base = w > T(6) ? T(6) : (w < T(0) ? T(0) : w);
      return base + (bump(a, k).delta - bump(magnitude(w - T(6)), k).delta);
    } else if constexpr (kind == Variant::kLeaky) {
      const T reach = magnitude(k(kReach)), delta = bump(reach * a, k).delta;
      const T base = w > T(0) ? w : k(kNear) * w;
      return base + (k(kReach) < T(0) ? -delta : delta);
    } else {
      return (w > T(0) ? w : T(0)) + bump(a, k).delta;
    }
  }

  // The gradient of w, and the terms of the sums without their constant factors. dy is the first factor of every product: later
  // factors may be infinite, and a dy of 0 gives 0.
  template <class K>
  static CTK_HD Gradients gradients(T w, T dy, const K& k) {
    const T a = magnitude(w);
    if constexpr (kind == Variant::kRelu6) {
      const auto low = bump(a, k), high = bump(magnitude(w - T(6)), k);
      const T step = (w > T(0) ? T(1) - low.h : low.h) - (w > T(6) ? T(1) - high.h : high.h);
      const T square = low.inner * low.outer - high.inner * high.outer;  // finite: see CtuRates::kFlat
      return {dy * step, {dy * square, dy * (low.s1 - high.s1), dy * (low.s2 - high.s2), dy * (low.s3 - high.s3)}};
    } else if constexpr (kind == Variant::kLeaky) {
      const auto b = bump(magnitude(k(kReach)) * a, k);
      const T fall = k(kReach) * b.h;
      const bool up = w > T(0);
      const T finite = capped(w, std::numeric_limits<T>::max());  // h is 0 where this caps
      return {dy * (up ? T(1) - fall : k(kNear) + fall),
              {b.square(dy), dy * b.s1, dy * b.s2, dy * b.s3, dy * (finite * (up ? b.h : T(1) - b.h))}};
    } else {
      const auto b = bump(a, k);
      return {dy * (w > T(0) ? T(1) - b.h : b.h), {b.square(dy), dy * b.s1, dy * b.s2, dy * b.s3}};
    }
  }

 private:
  struct Bump {
    T delta, h;      // the bump, and minus its derivative
    T inner, outer;  // factors of the first term of the parameter gradients, whose product may overflow
    T s1, s2, s3;    // the other terms
    CTK_HD T square(T dy) const { return dy * inner * outer; }
  };

  template <class K>
  static CTK_HD Bump bump(T a, const K& k) {
    const Decay<T> dt{k(kTHi), k(kTLo), k(kTLimit)}, du{k(kUHi), k(kULo), k(kULimit)};
    const T at = capped(a, dt.limit), au = capped(a, du.limit);
    if constexpr (has_tails(kind)) {
      const auto gt = gate_tail(a, at, dt), gu = gaussian_tail(a, au, du);
      const T aq = at * gt.cdf, ap = at * gt.pdf, uq = au * gu.cdf;
      return {fused(k(kC1S), gu.pdf, fused(k(kNegC), aq, -k(kC1) * uq)),
              fused(k(kC), fused(-k(kEta), ap, gt.cdf), k(kC1) * gu.cdf),
              ap, at, aq, gu.pdf, uq};
    } else {
      const T et = Math::decay(a, at, dt), eu = Math::decay(a, au, du);
      const T pt = Math::inverse(T(1) + et), pu = Math::inverse(T(1) + eu);
      const T qt = Math::times(et, pt), qu = Math::times(eu, pu), log_term = Math::log1p_unit(eu);
      const T aq = at * qt, ap = at * pt;
      T h;
      if constexpr (Math::kUncapped) h = fused(k(kC), fused(-k(kEta), aq * pt, qt), k(kC1) * qu);
      else h = fused(k(kC) * qt, fused(-k(kEta), ap, T(1)), k(kC1) * qu);
      return {fused(k(kC1S), log_term, k(kNegC) * aq), h, aq, ap, aq, log_term, au * qu};
    }
  }

  struct Tail {
    T pdf, cdf;  // S'(t) and S(-t), t >= 0
  };

  static CTK_HD Tail gate_tail(T a, T ac, const Decay<T>& d) {
    if constexpr (kind != Variant::kTanh) return gaussian_tail(a, ac, d);
    const auto [t, e] = tanh_gate(a, ac, d);
    const T p = Math::inverse(T(1) + e), q = Math::times(e, p);
    return {p * q * fused(T(3 * TanhGate::kCubic), t * t, T(TanhGate::kLinear)), q};
  }

  struct Decayed {
    T t, e;
  };
  static CTK_HD Decayed tanh_gate(float a, float ac, const Decay<float>& d) {
    if constexpr (Math::kUncapped) {
      const float t = capped(a * d.hi, 16.f);  // e is 0 there, and t^2 finite
      return {t, Math::tanh_gate_decay(t, 0.f)};
    }
    const float t = ac * d.hi, t_lo = fmaf(ac, d.lo, fmaf(ac, d.hi, -t)), e = Math::tanh_gate_decay(t, t_lo);
    return {t, a > d.limit ? 0.f : e};
  }
  static CTK_HD Decayed tanh_gate(double a, double ac, const Decay<double>& d) {
    const double t = ac * d.hi, e = exp(-t * fused(TanhGate::kCubic, t * t, TanhGate::kLinear));
    return {t, a > d.limit ? 0.0 : e};
  }

  static CTK_HD Tail gaussian_tail(float a, float ac, const Decay<float>& d) {
    if constexpr (Math::kUncapped) {
      const float t = a * d.hi, e = Math::bell(t, 0.f);
      return {0.3989422804f * e, e * Math::mills(t)};
    }
    const float t = ac * d.hi, t_lo = fmaf(ac, d.lo, fmaf(ac, d.hi, -t));
    float e = Math::bell(t, t_lo);
    e = a > d.limit ? 0.f : e;
    return {0.3989422804f * e, e * Math::mills(t)};
  }
  static CTK_HD Tail gaussian_tail(double a, double ac, const Decay<double>& d) {
    const double t = ac * d.hi;
    const bool gone = a > d.limit;
    return {gone ? 0.0 : 0.39894228040143267794 * exp(-0.5 * t * t), gone ? 0.0 : 0.5 * erfc(t * 0.70710678118654752440)};
  }
};

}  // namespace ctk
