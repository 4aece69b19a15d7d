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
  kTHi, kTLo, kTLimit,   // decay rate of the SiLU branch: t = beta a / s
  kUHi, kULo, kULimit,   // decay rate of the softplus branch: u = a / s
  kC, kC1, kNegC, kC1S,  // coeff, 1 - coeff, -coeff, (1 - coeff) s
  kEta,                  // beta / s
  kSlope, kReach,        // leaky only: slope, 1 - slope
  kCtuFields
};

// What a user's (beta, coeff), or their logits, mean. `s` and `coeff1` are 1 - beta (+ eps) and 1 - coeff, from a logit with all
// their digits: the difference to a sigmoid near 1 has none.
struct CtuKnobs {
  double beta, s, coeff, coeff1, dbeta, dcoeff;  // the last two: d beta / d given, d coeff / d given
};

CTK_ONCE CtuKnobs ctu_knobs(double beta, double coeff, bool raw, double eps) {
  if (!raw) return {beta, (1.0 - beta) + eps, coeff, 1.0 - coeff, 1.0, 1.0};
  const Sigmoids b = sigmoids(beta), c = sigmoids(coeff);
  return {b.of, b.of_negative + eps, c.of, c.of_negative, b.of * b.of_negative, c.of * c.of_negative};
}

// From one channel's sums (of Ctu::Grads::sums) to the gradients of the given beta and coeff.
struct CtuGradients {
  double beta, coeff;
};
CTK_ONCE CtuGradients ctu_parameter_gradients(const CtuKnobs& v, CtuKind kind, double slope, double eps, const double* sums) {
  const double inv_s = v.s < std::numeric_limits<double>::min() ? 0.0 : 1.0 / v.s;  // of NaN, NaN
  const double silu = v.coeff * (1.0 + eps) * (inv_s * (inv_s * sums[0]));
  double beta, coeff;
  if (kind == CtuKind::kGaussian) {
    beta = silu - v.coeff1 * sums[2];
    coeff = -(sums[1] + v.s * sums[2] - sums[3]);
  } else {
    beta = silu - v.coeff1 * (sums[2] + inv_s * sums[3]);
    coeff = -(sums[1] + v.s * sums[2]);
  }
  const double sign = kind == CtuKind::kLeaky && slope > 1.0 ? -1.0 : 1.0;
  return {sign * beta * v.dbeta, sign * coeff * v.dcoeff};
}

template <class T, CtuKind kind, class Math = Exact>
struct Ctu {
  static constexpr int kFields = kCtuFields;
  static constexpr int kSums = kind == CtuKind::kLeaky ? 5 : 4;

  // Writes field i to out[i * stride].
  static CTK_ONCE void derive(const CtuKnobs& v, double slope, T* out, int64_t stride) {
    const double inv_s = v.s > 0 ? 1.0 / v.s : std::numeric_limits<double>::infinity();
    const double eta = v.beta == 0 ? 0.0 : v.beta * inv_s;
    Decay<T> t, u;
    if (kind == CtuKind::kGaussian) {
      t = gaussian_decay(v.s > 0 ? eta : inv_s), u = gaussian_decay(inv_s);
    } else {
      t = make_decay<T>(v.s > 0 ? eta : inv_s), u = make_decay<T>(inv_s);
    }
    if constexpr (kind == CtuKind::kRelu6) t.limit = capped(t.limit, kFlat);
    const bool smooth = t.limit >= 0 && u.limit >= 0;
    // No bump shows a NaN in s: its rates are those of s = 0.
    const double coeff = v.coeff + v.s * 0.0, coeff1 = v.coeff1 + v.s * 0.0;
    const double fields[kCtuFields] = {t.hi, t.lo, t.limit, u.hi, u.lo, u.limit, coeff, coeff1, -coeff, coeff1 * v.s,
                                       smooth ? eta : 0.0, slope, reach(static_cast<T>(1.0 - slope))};
    for (int i = 0; i < kCtuFields; ++i) out[i * stride] = constant<T>(fields[i]);
  }

  // From here on w - 6 is w: the two bumps of a relu6 cancel, however far out they are evaluated. A square still fits.
  static constexpr T kFlat = 1152921504606846976.0;  // 2^60

  // Not 0 at slope 1, so that infinity stays infinite.
  static CTK_ONCE T reach(T r) { return r == T(0) ? std::numeric_limits<T>::denorm_min() : r; }

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

  // From the upstream gradient dy, the gradient of w and the terms whose sums over a channel make the parameter gradients: see
  // ctu_parameter_gradients. Constant factors stay out of the sums. dy is the first factor of every product: what comes after it
  // may be infinite, and a dy of 0 makes 0.
  struct Grads {
    T w, sums[kSums];
  };

  template <class K>
  static CTK_HD Grads gradients(T w, T dy, const K& k) {
    const T a = magnitude(w);
    if constexpr (kind == CtuKind::kRelu6) {
      const auto low = bump(a, k), high = bump(magnitude(w - T(6)), k);
      const T step = (w > T(0) ? T(1) - low.h : low.h) - (w > T(6) ? T(1) - high.h : high.h);
      const T square = low.inner * low.outer - high.inner * high.outer;  // finite: see kFlat
      return {dy * step, {dy * square, dy * (low.s1 - high.s1), dy * (low.s2 - high.s2), dy * (low.s3 - high.s3)}};
    } else if constexpr (kind == CtuKind::kLeaky) {
      const auto b = bump(magnitude(k(kReach)) * a, k);
      const T fall = k(kReach) * b.h;  // phi' relative to the near branch's own slope
      const bool up = w > T(0);
      const T finite = capped(w, std::numeric_limits<T>::max());  // up there h is 0
      return {dy * (up ? T(1) - fall : k(kSlope) + fall),
              {b.square(dy), dy * b.s1, dy * b.s2, dy * b.s3, dy * (finite * (up ? b.h : T(1) - b.h))}};
    } else {
      const auto b = bump(a, k);
      return {dy * (w > T(0) ? T(1) - b.h : b.h), {b.square(dy), dy * b.s1, dy * b.s2, dy * b.s3}};
    }
  }

 private:
  struct Bump {
    T delta, h;             // the bump and -d/da of it
    T inner, outer;         // terms of the parameter gradients: their product, which may overflow,
    T s1, s2, s3;           // and three more
    CTK_HD T square(T dy) const { return dy * inner * outer; }
  };

  // A Gaussian decays as e^(-t^2/2): the rate is kept for t itself, and the limit is where the square reaches 125 ln 2.
  static CTK_ONCE Decay<T> gaussian_decay(double rate) {
    constexpr bool single = sizeof(T) == 4;
    if (!(rate < (single ? 3e38 : 1e308))) return {T(0), T(0), T(-1)};
    const T hi = static_cast<T>(rate);
    const double limit = (single ? 13.16 : 37.0) / rate, top = std::numeric_limits<T>::max();
    return {hi, static_cast<T>(rate - hi), static_cast<T>(limit < top ? limit : top)};
  }

  template <class K>
  static CTK_HD Bump bump(T a, const K& k) {
    const Decay<T> dt{k(kTHi), k(kTLo), k(kTLimit)}, du{k(kUHi), k(kULo), k(kULimit)};
    const T at = capped(a, dt.limit), au = capped(a, du.limit);
    if constexpr (kind == CtuKind::kGaussian) {
      const auto gt = gaussian_tail(a, at, dt), gu = gaussian_tail(a, au, du);
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
    T pdf, cdf;  // phi(t) and Phi(-t), t >= 0
  };

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
