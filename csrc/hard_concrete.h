// Hard-concrete gates (Louizos, Welling, Kingma 2018): a logit log_alpha, stretched to (low, high) and clipped to [0, 1].
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

// Number `index` of a stream in (0, 1), 23 random bits (52 for double) and a half: word 0 (and 1) of Philox 4x32-10 (Salmon
// et al. 2011) with the seed as key and the index as counter. The same on every device.
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

CTK_ONCE double gate_sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

CTK_ONCE GateValue evaluate(const Gate& g, double log_alpha, double u) {
  const double width = g.high - g.low;
  switch (g.mode) {
    case GateMode::kOpen: {
      const double p = gate_sigmoid(log_alpha - g.temperature * log(-g.low / g.high));
      return {p, p * (1 - p), 0};
    }
    case GateMode::kMean: {  // E[g] = int_0^1 P(g > v) dv
      // 16-point Gauss-Legendre on [0, 1], positive half: E[g] is within 1e-11.
      constexpr double nodes[8] = {0.0950125098376374402, 0.2816035507792589132, 0.4580167776572273863, 0.6178762444026437484,
                                   0.7554044083550030339, 0.8656312023878317439, 0.9445750230732325761, 0.9894009349916499326};
      constexpr double weights[8] = {0.1894506104550684963, 0.1826034150449235889, 0.1691565193950025382,
                                     0.1495959888165767321, 0.1246289712555338720, 0.0951585116824927848,
                                     0.0622535239386478929, 0.0271524594117540949};
      double value = 0, slope = 0;
      for (int i = 0; i < 16; ++i) {
        const double node = i < 8 ? -nodes[i] : nodes[i - 8], v = 0.5 + 0.5 * node;
        const double p = gate_sigmoid(log_alpha - g.temperature * log((v - g.low) / (g.high - v)));
        value += 0.5 * weights[i % 8] * p;
        slope += 0.5 * weights[i % 8] * p * (1 - p);
      }
      return {value, slope, 0};
    }
    default: {
      const bool sampled = g.mode == GateMode::kSample;
      const double s = gate_sigmoid(sampled ? (log(u) - log1p(-u) + log_alpha) / g.temperature : log_alpha);
      const double stretched = s * width + g.low;
      const bool inside = stretched > 0 && stretched < 1;
      const double slope = inside ? width * s * (1 - s) / (sampled ? g.temperature : 1.0) : 0.0;
      const double clipped = stretched > 1 ? 1.0 : stretched < 0 ? 0.0 : stretched;
      return {clipped, slope, sampled && inside ? slope / (u * (1 - u)) : 0.0};
    }
  }
}

}  // namespace ctk
