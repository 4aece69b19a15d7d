// Per-channel parameters as the host code sees them, and what an op makes of them: derived constants before a kernel,
// parameter gradients after it. Shared by the CPU driver and the CUDA launch code.
#pragma once
#include "ctu.h"
#include "head_edit.h"
#include "layout.h"

namespace ctk {

// `count` values for `channels` channels: channel c reads value c / (channels / count), so 1 is shared by all and the
// number of heads is one a head. Group g of the view reads row g % groups.
struct Param {
  const void* data = nullptr;  // null: absent, `fallback` everywhere
  bool is_double = false;
  int64_t groups = 1, count = 1;
  double fallback = 0.0;

  int64_t index(int64_t g, int64_t c, int64_t channels) const {
    return (g % groups) * count + (count == channels ? c : c / (channels / count));
  }
  double at(int64_t g, int64_t c, int64_t channels) const {
    if (!data) return fallback;
    const int64_t i = index(g, c, channels);
    return is_double ? static_cast<const double*>(data)[i] : static_cast<double>(static_cast<const float*>(data)[i]);
  }
  int64_t numel() const { return groups * count; }
};

inline constexpr int kMaxParams = 5;

// The CT unit: beta, coeff, slope, scale, shift.
struct CtuStatic {
  CtuKind kind;
  bool raw;
  double eps;
};
enum CtuParam : int { kBeta, kCoeff, kSlopeParam, kScaleParam, kShiftParam, kCtuParams };

template <class T>
CTK_ONCE void derive_ctu(const CtuStatic& cfg, const double* p, T* out, int64_t stride) {
  const CtuKnobs knobs = ctu_knobs(p[kBeta], p[kCoeff], cfg.raw, cfg.eps);
  if (cfg.kind == CtuKind::kGaussian) Ctu<T, CtuKind::kGaussian>::derive(knobs, p[kSlopeParam], out, stride);
  else Ctu<T, CtuKind::kLogistic>::derive(knobs, p[kSlopeParam], out, stride);
}

// Sums of one channel: the op's own, then, where the prologue's are wanted, kCtuScaleSum and kCtuShiftSum.
enum CtuSum : int { kCtuSlopeSum = 4, kCtuScaleSum = 5, kCtuShiftSum = 6, kCtuSums = 7 };

CTK_ONCE void finish_ctu(const CtuStatic& cfg, const double* p, const double* sums, double* grads) {
  const CtuKnobs knobs = ctu_knobs(p[kBeta], p[kCoeff], cfg.raw, cfg.eps);
  const CtuGradients g = ctu_parameter_gradients(knobs, cfg.kind, p[kSlopeParam], cfg.eps, sums);
  grads[kBeta] = g.beta;
  grads[kCoeff] = g.coeff;
  grads[kSlopeParam] = sums[kCtuSlopeSum];
  grads[kScaleParam] = sums[kCtuScaleSum];
  grads[kShiftParam] = sums[kCtuShiftSum];
}

// The head edit: m, a, g_m, g_a.
enum HeadEditParam : int { kM, kA, kGateM, kGateA, kHeadEditParams };

template <class T>
CTK_ONCE void derive_head_edit(const double* p, T* out, int64_t stride) {
  out[0] = static_cast<T>(1.0 + p[kGateM] * p[kM]);
  out[stride] = static_cast<T>(p[kGateA] * p[kA]);
}

// sums: S1 = sum dy z, S0 = sum dy.
CTK_ONCE void finish_head_edit(const double* p, const double* sums, double* grads) {
  grads[kM] = p[kGateM] * sums[0];
  grads[kA] = p[kGateA] * sums[1];
  grads[kGateM] = p[kM] * sums[0];
  grads[kGateA] = p[kA] * sums[1];
}

}  // namespace ctk
