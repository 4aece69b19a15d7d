// Hard-concrete gates (Louizos, Welling, Kingma 2018): sigmoids stretched to (low, high) and clipped to [0, 1].
#pragma once
#include "scalar.h"

namespace ctk {

enum class GateMode : int {
  kSample = 0,      // from uniform noise u: clip(sigma((logit u + log_alpha) / temperature))
  kClip = 1,        // deterministic: clip(sigma(log_alpha))
  kMean = 2,        // E[g], by quadrature
  kOpen = 3,        // P(g != 0)
};

struct Gate {
  GateMode mode;
  double temperature, low, high;
};

struct GateValue {
  double value, slope, noise_slope;  // g, dg / d log_alpha, dg / du
};

// Uniform number `index` of a stream in (0, 1): 23 random bits (52 for double) plus a half. Word 0 (and 1) of Philox 4x32-10
// (Salmon et al. 2011) with the seed as key and the index as counter. The same on every device.
template <class T>
CTK_ONCE T uniform(uint64_t seed, uint64_t index) {
  uint32_t c0 = uint32_t(index), c1 = uint32_t(index >> 32), c2 = 0, c3 = 0, k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p = uint64_t(c0) * 0xD2511F53u, q = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(q >> 32) ^ c1 ^ k0, c1 = uint32_t(q), c2 = uint32_t(p >> 32) ^ c3 ^ k1, c3 = uint32_t(p);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  if constexpr (sizeof(T) == 8) return (double(uint64_t(c0) << 20 | c1 >> 12) + 0.5) * 0x1p-52;
  else return (float(c0 >> 9) + 0.5f) * 0x1p-23f;
}

// E[g] is the integral of P(g > v) over v in [0, 1]. With v = low + width sigma(y) that is
//
//     integral of sigma(log_alpha - temperature y) width sigma(y) sigma(-y) dy     from y = log(-low / high) to log((1 - low) / (high - 1)),
//
// smooth however close low and high are to 0 and 1: the nearest singularities are pi / max(temperature, 1) off the real line.
// 16-point Gauss-Legendre on panels of at most 5 / pi times that distance is within 1e-13. Beyond |y| = 38 the integrand is 0.
struct GatePanels {
  double start, length;
  int count;
};
CTK_ONCE GatePanels gate_panels(const Gate& g) {
  const double first = log(-g.low / g.high), start = first > -38.0 ? first : -38.0;
  const double range = log1p((g.high - g.low) / (g.high - 1.0) / -g.low);  // from the first y to the last
  const double length = fmin(range - (start - first), 38.0 - start);
  const double count = fmax(ceil(length * fmax(g.temperature, 1.0) / 5.0), 1.0);
  return {start, length / count, static_cast<int>(count)};
}

CTK_ONCE GateValue mean_gate(const Gate& g, double log_alpha) {
  constexpr double nodes[8] = {0.0950125098376374402, 0.2816035507792589132, 0.4580167776572273863, 0.6178762444026437484,
                               0.7554044083550030339, 0.8656312023878317439, 0.9445750230732325761, 0.9894009349916499326};
  constexpr double weights[8] = {0.1894506104550684963, 0.1826034150449235889, 0.1691565193950025382, 0.1495959888165767321,
                                 0.1246289712555338720, 0.0951585116824927848, 0.0622535239386478929, 0.0271524594117540949};
  const GatePanels panels = gate_panels(g);
  double value = 0, slope = 0;
  for (int panel = 0; panel < panels.count; ++panel) {
    for (int i = 0; i < 16; ++i) {
      const double node = i < 8 ? -nodes[i] : nodes[i - 8];
      const double y = panels.start + (panel + 0.5 + 0.5 * node) * panels.length;
      const Sigmoids v = sigmoids(y), p = sigmoids(log_alpha - g.temperature * y);
      const double weight = 0.5 * panels.length * weights[i % 8] * (g.high - g.low) * v.of * v.of_negative;
      value += weight * p.of;
      slope += weight * p.of * p.of_negative;
    }
  }
  return {value > 1.0 ? 1.0 : value, slope, 0};  // rounding may exceed 1
}

CTK_ONCE GateValue evaluate(const Gate& g, double log_alpha, double u) {
  if (g.mode == GateMode::kMean) return mean_gate(g, log_alpha);
  if (g.mode == GateMode::kOpen) {
    const Sigmoids p = sigmoids(log_alpha - g.temperature * log(-g.low / g.high));
    return {p.of, p.of * p.of_negative, 0};
  }
  const bool sampled = g.mode == GateMode::kSample;
  const Sigmoids s = sigmoids(sampled ? (log(u) - log1p(-u) + log_alpha) / g.temperature : log_alpha);
  const double width = g.high - g.low, stretched = s.of * width + g.low;
  const bool settled = stretched <= 0 || stretched >= 1;  // false for NaN
  const double slope = settled ? 0.0 : width * s.of * s.of_negative / (sampled ? g.temperature : 1.0);
  const double clipped = stretched > 1 ? 1.0 : stretched < 0 ? 0.0 : stretched;
  return {clipped, slope, sampled && !settled ? slope / (u * (1 - u)) : 0.0};
}

// A call: contiguous tensors of n values, in float or double. Null outputs are not computed.
struct Gates {
  const void *log_alpha, *noise, *dy;  // noise: null if nothing is sampled, else n values or, with `seeded`, a seed
  void *value, *d_log_alpha, *d_noise;
  int64_t n;
  Gate gate;
  bool seeded;
};

template <class T>
CTK_ONCE GateValue gate_at(const Gates& a, int64_t i) {
  T u = T(0.5);
  if (a.noise) u = a.seeded ? uniform<T>(*static_cast<const uint64_t*>(a.noise), i) : static_cast<const T*>(a.noise)[i];
  return evaluate(a.gate, static_cast<const T*>(a.log_alpha)[i], u);
}

template <class T>
CTK_ONCE void gate_forward(const Gates& a, int64_t i) {
  static_cast<T*>(a.value)[i] = static_cast<T>(gate_at<T>(a, i).value);
}

template <class T>
CTK_ONCE void gate_backward(const Gates& a, int64_t i) {
  const GateValue gate = gate_at<T>(a, i);
  const double dy = static_cast<const T*>(a.dy)[i];
  if (a.d_log_alpha) static_cast<T*>(a.d_log_alpha)[i] = static_cast<T>(dy * gate.slope);
  if (a.d_noise) static_cast<T*>(a.d_noise)[i] = static_cast<T>(dy * gate.noise_slope);
}

}  // namespace ctk
