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

// Parameters, constants, sums and gradients of one channel lie `stride` apart.
template <class T>
CTK_ONCE void derive_ctu(const CtuStatic& cfg, const double* p, T* out, int64_t stride) {
  const CtuKnobs knobs = ctu_knobs(p[kBeta * stride], p[kCoeff * stride], cfg.raw, cfg.eps);
  if (cfg.kind == CtuKind::kGaussian) Ctu<T, CtuKind::kGaussian>::derive(knobs, p[kSlopeParam * stride], out, stride);
  else if (cfg.kind == CtuKind::kRelu6) Ctu<T, CtuKind::kRelu6>::derive(knobs, p[kSlopeParam * stride], out, stride);
  else Ctu<T, CtuKind::kLogistic>::derive(knobs, p[kSlopeParam * stride], out, stride);
}

// Sums of one channel: the op's own, then, where the prologue's are wanted, kCtuScaleSum and kCtuShiftSum.
enum CtuSum : int { kCtuSlopeSum = 4, kCtuScaleSum = 5, kCtuShiftSum = 6, kCtuSums = 7 };

CTK_ONCE void finish_ctu(const CtuStatic& cfg, const double* p, const double* sums, double* grads, int64_t stride = 1) {
  const CtuKnobs knobs = ctu_knobs(p[kBeta * stride], p[kCoeff * stride], cfg.raw, cfg.eps);
  const double own[] = {sums[0], sums[stride], sums[2 * stride], sums[3 * stride]};
  const CtuGradients g = ctu_parameter_gradients(knobs, cfg.kind, p[kSlopeParam * stride], cfg.eps, own);
  grads[kBeta * stride] = g.beta;
  grads[kCoeff * stride] = g.coeff;
  grads[kSlopeParam * stride] = sums[kCtuSlopeSum * stride];
  grads[kScaleParam * stride] = sums[kCtuScaleSum * stride];
  grads[kShiftParam * stride] = sums[kCtuShiftSum * stride];
}

// The head edit: m, a, g_m, g_a.
enum HeadEditParam : int { kM, kA, kGateM, kGateA, kHeadEditParams };

template <class T>
CTK_ONCE void derive_head_edit(const double* p, T* out, int64_t stride) {
  out[0] = constant<T>(1.0 + p[kGateM * stride] * p[kM * stride]);
  out[stride] = constant<T>(p[kGateA * stride] * p[kA * stride]);
}

// sums: S1 = sum dy z, S0 = sum dy.
CTK_ONCE void finish_head_edit(const double* p, const double* sums, double* grads, int64_t stride = 1) {
  grads[kM * stride] = p[kGateM * stride] * sums[0];
  grads[kA * stride] = p[kGateA * stride] * sums[stride];
  grads[kGateM * stride] = p[kM * stride] * sums[0];
  grads[kGateA * stride] = p[kA * stride] * sums[stride];
}

}  // namespace ctk
