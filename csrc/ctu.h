// The CT unit. phi(w) = relu(w) + delta(|w|), where delta is an even bump of height (1 - c) s ln 2 that vanishes away
// from 0; its derivative enters as h: phi'(w) = w > 0 ? 1 - h(|w|) : h(|w|). Everything below is a function of a = |w|
// alone, nothing cancels, and at beta = 1 the bump is exactly 0, so that the unit is the plain activation bit for bit.
// Derivation and error bounds: ctkernels/ops/ctu/README.md.
#pragma once
#include "scalar.h"

namespace ctk {

enum class CtuKind : int { kLogistic = 0, kLeaky = 1, kRelu6 = 2, kGaussian = 3 };

// Per-channel constants, derived once per channel in double precision. `k(field)` reads one.
enum CtuField : int {
  kTHi, kTLo, kTLimit,  // decay rate of the SiLU branch: t = beta a / s
  kUHi, kULo, kULimit,  // decay rate of the softplus branch: u = a / s
  kC, kC1,              // coeff, 1 - coeff
  kS, kInvS, kEta,      // s, 1 / s, beta / s
  kBetaGain,            // coeff (1 + eps)
  kSlope, kReach,       // leaky only: slope, 1 - slope
  kCtuFields
};

// What a user's (beta, coeff), or their logits, mean.
struct CtuKnobs {
  double beta, s, coeff, dbeta, dcoeff;  // the last two: d beta / d given, d coeff / d given
};

inline double sigmoid(double r) { return 1.0 / (1.0 + exp(-r)); }

inline CtuKnobs ctu_knobs(double beta, double coeff, bool raw, double eps) {
  if (!raw) return {beta, (1.0 - beta) + eps, coeff, 1.0, 1.0};
  const double b = sigmoid(beta), b1 = sigmoid(-beta), c = sigmoid(coeff), c1 = sigmoid(-coeff);
  return {b, b1 + eps, c, b * b1, c * c1};
}

template <class T, CtuKind kind>
struct Ctu {
  static constexpr int kFields = kCtuFields;
  static constexpr int kSums = kind == CtuKind::kLeaky ? 3 : 2;  // dbeta, dcoeff, dslope

  // Writes field i to out[i * stride].
  static void derive(const CtuKnobs& v, double slope, double eps, T* out, int64_t stride) {
    const double inv_s = v.s > 0 ? 1.0 / v.s : std::numeric_limits<double>::infinity();
    const double eta = v.beta == 0 ? 0.0 : v.beta * inv_s;
    Decay<T> t, u;
    if (kind == CtuKind::kGaussian) {
      t = gaussian_decay(v.s > 0 ? eta : inv_s), u = gaussian_decay(inv_s);
    } else {
      t = make_decay<T>(v.s > 0 ? eta : inv_s), u = make_decay<T>(inv_s);
    }
    const bool smooth = t.limit >= 0 && u.limit >= 0;
    const double fields[kCtuFields] = {t.hi, t.lo, t.limit, u.hi, u.lo, u.limit, v.coeff, 1.0 - v.coeff, v.s,
                                       smooth ? inv_s : 0.0, smooth ? eta : 0.0, v.coeff * (1.0 + eps), slope, 1.0 - slope};
    for (int i = 0; i < kCtuFields; ++i) out[i * stride] = static_cast<T>(fields[i]);
  }

  template <class K>
  static CTK_HD T forward(T w, const K& k) {
    const T a = magnitude(w);
    if constexpr (kind == CtuKind::kRelu6) {
      const T base = w > T(6) ? T(6) : (w < T(0) ? T(0) : w);
      return base + (bump(a, k).delta - bump(magnitude(w - T(6)), k).delta);
    } else if constexpr (kind == CtuKind::kLeaky) {
      const T reach = magnitude(k(kReach)), delta = bump(reach * a, k).delta;
      const T base = w > T(0) ? w : k(kSlope) * w;
      return base + (k(kReach) < T(0) ? -delta : delta);
    } else {
      return (w > T(0) ? w : T(0)) + bump(a, k).delta;
    }
  }

  struct Grads {
    T w, sums[3];  // d/dw; d/dbeta, d/dcoeff, d/dslope
  };

  template <class K>
  static CTK_HD Grads gradients(T w, const K& k) {
    const T a = magnitude(w);
    if constexpr (kind == CtuKind::kRelu6) {
      const auto low = bump(a, k), high = bump(magnitude(w - T(6)), k);
      const T step = (w > T(0) ? T(1) - low.h : low.h) - (w > T(6) ? T(1) - high.h : high.h);
      return {step, {low.beta - high.beta, low.coeff - high.coeff, T(0)}};
    } else if constexpr (kind == CtuKind::kLeaky) {
      const auto b = bump(magnitude(k(kReach)) * a, k);
      const T fall = k(kReach) * b.h;  // phi' relative to the near branch's own slope
      const bool up = w > T(0), flip = k(kReach) < T(0);
      return {up ? T(1) - fall : k(kSlope) + fall,
              {flip ? -b.beta : b.beta, flip ? -b.coeff : b.coeff, w * (up ? b.h : T(1) - b.h)}};
    } else {
      const auto b = bump(a, k);
      return {w > T(0) ? T(1) - b.h : b.h, {b.beta, b.coeff, T(0)}};
    }
  }

 private:
  struct Bump {
    T delta, h, beta, coeff;  // delta and -d/da of it (as h), d/dbeta, d/dcoeff
  };

  // A Gaussian decays as e^(-t^2/2): the rate is kept for t itself, and the limit is where the square reaches 125 ln 2.
  static Decay<T> gaussian_decay(double rate) {
    constexpr bool single = sizeof(T) == 4;
    if (!(rate < (single ? 3e38 : 1e308))) return {T(0), T(0), T(-1)};
    const T hi = static_cast<T>(rate);
    const double limit = (single ? 13.16 : 37.0) / rate, top = std::numeric_limits<T>::max();
    return {hi, static_cast<T>(rate - hi), static_cast<T>(limit < top ? limit : top)};
  }

  template <class K>
  static CTK_HD Bump bump(T a, const K& k) {
    const Decay<T> dt{k(kTHi), k(kTLo), k(kTLimit)}, du{k(kUHi), k(kULo), k(kULimit)};
    const T at = capped(a, dt), au = capped(a, du);
    const T tau = at * k(kEta), u = au * k(kInvS);
    const T top = sizeof(T) == 4 ? T(1.8e19) : T(1e154);  // its square is still finite
    T ut = at * k(kInvS);
    ut = top < ut ? top : ut;
    if constexpr (kind == CtuKind::kGaussian) {
      const auto gt = gaussian_tail(a, at, dt), gu = gaussian_tail(a, au, du);
      const T soft = gu.pdf - u * gu.cdf;
      return {fused(k(kC1) * k(kS), soft, -(k(kC) * at) * gt.cdf),
              fused(k(kC), gt.cdf - tau * gt.pdf, k(kC1) * gu.cdf),
              k(kBetaGain) * (ut * (ut * gt.pdf)) - k(kC1) * gu.pdf,
              -fused(at, gt.cdf, k(kS) * soft)};
    } else {
      const T et = decay(a, at, dt), eu = decay(a, au, du);
      const T pt = T(1) / (T(1) + et), pu = T(1) / (T(1) + eu);
      const T qt = et * pt, qu = eu * pu, log_term = log1p_unit(eu);
      return {fused(k(kC1) * k(kS), log_term, -(k(kC) * at) * qt),
              fused(k(kC) * qt, fused(-tau, pt, T(1)), k(kC1) * qu),
              k(kBetaGain) * (ut * (ut * (qt * pt))) - k(kC1) * fused(u, qu, log_term),
              -fused(at, qt, k(kS) * log_term)};
    }
  }

  struct Tail {
    T pdf, cdf;  // phi(t) and Phi(-t), t >= 0
  };

  static CTK_HD Tail gaussian_tail(float a, float ac, const Decay<float>& d) {
    const float t = ac * d.hi, t_lo = fmaf(ac, d.lo, fmaf(ac, d.hi, -t));
    const float y = t * t, y_lo = fmaf(2.f * t, t_lo, fmaf(t, t, -y));
    constexpr float half_log2e = 0.72134752f, half_log2e_lo = 9.6298149e-9f;
    const float z = fmaf(-y, half_log2e, kRoundMagic);
    float f = fmaf(-y, half_log2e, kRoundMagic - z);
    f = fmaf(-y, half_log2e_lo, f);
    f = fmaf(-y_lo, half_log2e, f);
    float e = exp2_split(f, z);
    e = a > d.limit ? 0.f : e;
    return {0.3989422804f * e, e * mills(t)};
  }
  static CTK_HD Tail gaussian_tail(double a, double ac, const Decay<double>& d) {
    const double t = ac * d.hi;
    const bool gone = a > d.limit;
    return {gone ? 0.0 : 0.39894228040143267794 * exp(-0.5 * t * t), gone ? 0.0 : 0.5 * erfc(t * 0.70710678118654752440)};
  }
};

}  // namespace ctk
