// Kernels from memory to memory for AVX-512: loads, conversions, maths and stores in one pass.
// The CT unit in bfloat16 and half, where what the compiler makes of the scalar headers is bound by instructions: same
// formulas as ctu.h, but the exponential is two instructions shorter and the reciprocals are the machine's 14-bit
// estimates. Relative errors 9e-5 (2^f), 6e-5 (log1p), 6e-5 (1/d): a fraction of half an ulp of either type.
// The head edit in every type but double, where all that counts is how memory is read and written.
#pragma once
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns about its own intrinsics (its bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "block.h"
#include "../ctu.h"
#include "../head_edit.h"

namespace ctk::cpu {
namespace {
namespace direct {

using V = __m512;
using Mask = __mmask16;

inline V all(float v) { return _mm512_set1_ps(v); }
inline __m512i bits(V v) { return _mm512_castps_si512(v); }
inline V real(__m512i v) { return _mm512_castsi512_ps(v); }

// 32 values as two vectors, in order; `live` masks the tail of a run.
struct Pair {
  V v[2];
};

constexpr __mmask32 kFull = ~__mmask32(0);
inline Mask part(__mmask32 live, int h) { return static_cast<Mask>(live >> 16 * h); }

CTK_HD void store_words(uint16_t* p, __mmask32 live, bool stream, __m512i words) {
  if (stream && live == kFull) _mm512_stream_si512(reinterpret_cast<__m512i*>(p), words);
  else _mm512_mask_storeu_epi16(p, live, words);
}

struct BFloat16 {
  using Value = uint16_t;
  static Pair load(const Value* p, __mmask32 live) {
    const __m512i raw = _mm512_maskz_loadu_epi16(live, p);
    // word i to the high half of lane i, zeros below
    const __m512i low = _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, spread(0), raw);
    const __m512i high = _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, spread(16), raw);
    return {{real(low), real(high)}};
  }
  template <bool exact>
  static void store(Value* p, __mmask32 live, bool stream, const Pair& y) {
    const __m512i words = _mm512_permutex2var_epi16(rounded<exact>(y.v[0]), high_words(), rounded<exact>(y.v[1]));
    store_words(p, live, stream, words);
  }

 private:
  // To nearest, in the high half of each lane; ties to even where results can be `exact`, away from zero where a tie is
  // an accident of 1e-4. NaNs pass: those that can come here have a low half of zeros.
  template <bool exact>
  static __m512i rounded(V v) {
    if constexpr (!exact) return _mm512_add_epi32(bits(v), _mm512_set1_epi32(0x8000));
    const __mmask16 odd = _mm512_test_epi32_mask(bits(v), _mm512_set1_epi32(0x10000));
    const __m512i even = _mm512_add_epi32(bits(v), _mm512_set1_epi32(0x7fff));
    return _mm512_mask_add_epi32(even, odd, bits(v), _mm512_set1_epi32(0x8000));
  }
  static __m512i spread(int from) {
    alignas(64) static constexpr auto index = [] {
      struct { int16_t i[2][32]; } t{};
      for (int h = 0; h < 2; ++h)
        for (int j = 0; j < 32; ++j) t.i[h][j] = static_cast<int16_t>(16 * h + j / 2);
      return t;
    }();
    return _mm512_load_si512(index.i[from / 16]);
  }
  static __m512i high_words() {
    alignas(64) static constexpr auto index = [] {
      struct { int16_t i[32]; } t{};
      for (int j = 0; j < 32; ++j) t.i[j] = static_cast<int16_t>(2 * j + 1);
      return t;
    }();
    return _mm512_load_si512(index.i);
  }
};

struct Half {
  using Value = uint16_t;
  static Pair load(const Value* p, __mmask32 live) {
    const __m512i raw = _mm512_maskz_loadu_epi16(live, p);
    return {{_mm512_cvtph_ps(_mm512_castsi512_si256(raw)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(raw, 1))}};
  }
  template <bool>
  static void store(Value* p, __mmask32 live, bool stream, const Pair& y) {
    const __m256i low = _mm512_cvtps_ph(y.v[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i high = _mm512_cvtps_ph(y.v[1], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    store_words(p, live, stream, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
  }
};

struct Float {
  using Value = float;
  static Pair load(const Value* p, __mmask32 live) {
    return {{_mm512_maskz_loadu_ps(part(live, 0), p), _mm512_maskz_loadu_ps(part(live, 1), p + 16)}};
  }
  template <bool>
  static void store(Value* p, __mmask32 live, bool stream, const Pair& y) {
    for (int h = 0; h < 2; ++h) {
      if (stream && live == kFull) _mm512_stream_ps(p + 16 * h, y.v[h]);
      else _mm512_mask_storeu_ps(p + 16 * h, part(live, h), y.v[h]);
    }
  }
};

// ---- the CT unit ---------------------------------------------------------------------------------------------------

struct CtuVectors {
  static constexpr int kSums = 4;
  static constexpr bool kExact = false;
  V t_rate, u_rate, t_limit, u_limit, c, c1, c1s, c_eta;

  template <class Field>  // field(i): the vector of constant i
  explicit CtuVectors(const Field& field)
      : t_rate(exponent_rate(field(kTHi))), u_rate(exponent_rate(field(kUHi))), t_limit(field(kTLimit)),
        u_limit(field(kULimit)), c(field(kC)), c1(field(kC1)), c1s(field(kC1S)),
        c_eta(_mm512_mul_ps(field(kC), field(kEta))) {}

  V forward(V w) const {
    const V a = _mm512_abs_ps(w), base = _mm512_max_ps(w, _mm512_setzero_ps());
    const Mask t_near = within(a, t_limit);
    const V et = decay(a, t_rate, t_near), eu = decay(a, u_rate, within(a, u_limit));
    // base - c a et / (1 + et) + (1 - c) s log1p(eu). An infinite a leaves base alone.
    const V ratio = _mm512_div_ps(_mm512_mul_ps(c, a), _mm512_add_ps(et, all(1.f)));
    const V y = _mm512_mask3_fnmadd_ps(et, ratio, base, t_near);
    return _mm512_fmadd_ps(_mm512_mul_ps(c1s, log1p_over(eu)), eu, y);
  }

  // dw, and with `sums` the terms of ctu_parameter_gradients added to them.
  template <bool sums>
  V backward(V w, V dy, V* sum) const {
    const V a = _mm512_abs_ps(w), one = all(1.f);
    const Mask t_near = within(a, t_limit), u_near = within(a, u_limit);
    const V et = decay(a, t_rate, t_near), eu = decay(a, u_rate, u_near);
    const V pt = _mm512_rcp14_ps(_mm512_add_ps(et, one)), pu = _mm512_rcp14_ps(_mm512_add_ps(eu, one));
    const V qt = _mm512_mul_ps(et, pt), qu = _mm512_mul_ps(eu, pu);
    const V ap = _mm512_maskz_mul_ps(t_near, a, pt);
    const V h = _mm512_fmadd_ps(qt, _mm512_fnmadd_ps(c_eta, ap, c), _mm512_mul_ps(c1, qu));
    const Mask up = _mm512_cmp_ps_mask(w, _mm512_setzero_ps(), _CMP_GT_OQ);
    if constexpr (sums) {
      const V s1 = _mm512_mul_ps(dy, _mm512_maskz_mul_ps(t_near, a, qt));
      sum[0] = _mm512_fmadd_ps(s1, ap, sum[0]);
      sum[1] = _mm512_add_ps(sum[1], s1);
      sum[2] = _mm512_fmadd_ps(_mm512_mul_ps(dy, eu), log1p_over(eu), sum[2]);
      sum[3] = _mm512_mask3_fmadd_ps(_mm512_mul_ps(dy, qu), a, sum[3], u_near);
    }
    return _mm512_mul_ps(dy, _mm512_mask_sub_ps(h, up, one, h));
  }

 private:
  static Mask within(V a, V limit) { return _mm512_cmp_ps_mask(a, limit, _CMP_NGT_UQ); }  // a NaN is within

  // The rate in units of the last place of an exponent field. Rates beyond the cap act on values below 1e-29 alone.
  static V exponent_rate(V hi) { return _mm512_mul_ps(_mm512_min_ps(hi, all(4e31f)), all(8388608.f)); }

  // 2^(-a rate) where `near`, else 0. The bits of (127 - a rate) 2^23 hold floor and fraction of the exponent; a cubic
  // that maps [1, 2) into [1, 2) turns the fraction into a significand.
  static V decay(V a, V rate, Mask near) {
    const __m512i low = _mm512_set1_epi32(0x7fffff);
    const __m512i z = _mm512_cvtps_epi32(_mm512_fnmadd_ps(a, rate, all(1065353216.f)));
    const V g = real(_mm512_ternarylogic_epi32(z, low, _mm512_set1_epi32(0x3f800000), 0xea));  // (z & low) | 1.0
    V p = _mm512_fmadd_ps(all(0.07706496f), g, all(-0.0035463814f));
    p = _mm512_fmadd_ps(p, g, all(0.471013f));
    p = _mm512_fmadd_ps(p, g, all(0.45546862f));
    return real(_mm512_maskz_ternarylogic_epi32(near, bits(p), z, low, 0xe4));  // p's low bits, z's others
  }

  // log(1 + e) / e
  static V log1p_over(V e) {
    V p = _mm512_fmadd_ps(all(0.041347300758f), e, all(-0.157427203911f));
    p = _mm512_fmadd_ps(p, e, all(0.306300927591f));
    p = _mm512_fmadd_ps(p, e, all(-0.496977805093f));
    return _mm512_fmadd_ps(p, e, all(0.999943277947f));
  }
};

// ---- the head edit -------------------------------------------------------------------------------------------------

struct HeadEditVectors {
  static constexpr int kSums = 2;
  static constexpr bool kExact = true;
  V p, q;

  template <class Field>
  explicit HeadEditVectors(const Field& field) : p(field(0)), q(field(1)) {}

  V forward(V z) const { return _mm512_fmadd_ps(p, z, q); }

  template <bool sums>
  V backward(V z, V dy, V* sum) const {
    if constexpr (sums) {
      sum[0] = _mm512_fmadd_ps(dy, z, sum[0]);
      sum[1] = _mm512_add_ps(sum[1], dy);
    }
    return _mm512_mul_ps(p, dy);
  }
};

// ---- loops ---------------------------------------------------------------------------------------------------------

// f(i, live) for every 32 values from i; all of them are live but in the last call.
template <class F>
CTK_HD void for_pairs(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) f(i, kFull);
  if (i < n) f(i, (__mmask32(1) << (n - i)) - 1);
}

// The op with the constants of lanes 16 h to 16 h + 15.
template <class Op>
Op lanes_op(const float* consts, int64_t stride, __mmask32 live, int h) {
  return Op([&](int f) { return _mm512_maskz_loadu_ps(part(live, h), consts + f * stride + 16 * h); });
}

template <class Format, class Op>
void forward_uniform(const void* x_, void* y_, const float* consts, int64_t n, bool stream) {
  const auto* x = static_cast<const typename Format::Value*>(x_);
  auto* y = static_cast<typename Format::Value*>(y_);
  const Op op([&](int i) { return all(consts[i]); });
  for_pairs(n, [&](int64_t i, __mmask32 live) __attribute__((always_inline)) {
    Pair w = Format::load(x + i, live);
    for (V& v : w.v) v = op.forward(v);
    Format::template store<Op::kExact>(y + i, live, stream, w);
  });
}

template <class Format, class Op>
void forward_lanes(const void* x_, void* y_, const float* consts, int64_t stride, int64_t rows, int64_t row, int64_t n,
                   bool stream) {
  const auto* x = static_cast<const typename Format::Value*>(x_);
  auto* y = static_cast<typename Format::Value*>(y_);
  for_pairs(n, [&](int64_t i, __mmask32 live) __attribute__((always_inline)) {
    const Op ops[2] = {lanes_op<Op>(consts + i, stride, live, 0), lanes_op<Op>(consts + i, stride, live, 1)};
    for (int64_t r = 0; r < rows; ++r) {
      Pair w = Format::load(x + r * row + i, live);
      for (int h = 0; h < 2; ++h) w.v[h] = ops[h].forward(w.v[h]);
      Format::template store<Op::kExact>(y + r * row + i, live, stream, w);
    }
  });
}

template <class Format, class Op, bool sums>
void backward_uniform(const void* x_, const void* dy_, void* dx_, const float* consts, double* totals, int64_t n,
                      bool stream) {
  const auto* x = static_cast<const typename Format::Value*>(x_);
  const auto* dy = static_cast<const typename Format::Value*>(dy_);
  auto* dx = static_cast<typename Format::Value*>(dx_);
  const Op op([&](int i) { return all(consts[i]); });
  V sum[2][Op::kSums] = {};
  for_pairs(n, [&](int64_t i, __mmask32 live) __attribute__((always_inline)) {
    const Pair w = Format::load(x + i, live);
    Pair g = Format::load(dy + i, live);
    for (int h = 0; h < 2; ++h) g.v[h] = op.template backward<sums>(w.v[h], g.v[h], sum[h]);
    if (dx) Format::template store<Op::kExact>(dx + i, live, stream, g);
  });
  if constexpr (sums)
    for (int s = 0; s < Op::kSums; ++s) totals[s] += _mm512_reduce_add_ps(_mm512_add_ps(sum[0][s], sum[1][s]));
}

template <class Format, class Op, bool sums>
void backward_lanes(const void* x_, const void* dy_, void* dx_, const float* consts, int64_t stride, float* lanes,
                    int64_t rows, int64_t row, int64_t n, bool stream) {
  const auto* x = static_cast<const typename Format::Value*>(x_);
  const auto* dy = static_cast<const typename Format::Value*>(dy_);
  auto* dx = static_cast<typename Format::Value*>(dx_);
  for_pairs(n, [&](int64_t i, __mmask32 live) __attribute__((always_inline)) {
    V sum[2][Op::kSums] = {};
    const Op ops[2] = {lanes_op<Op>(consts + i, stride, live, 0), lanes_op<Op>(consts + i, stride, live, 1)};
    for (int64_t r = 0; r < rows; ++r) {
      const Pair w = Format::load(x + r * row + i, live);
      Pair g = Format::load(dy + r * row + i, live);
      for (int h = 0; h < 2; ++h) g.v[h] = ops[h].template backward<sums>(w.v[h], g.v[h], sum[h]);
      if (dx) Format::template store<Op::kExact>(dx + r * row + i, live, stream, g);
    }
    if constexpr (sums) {
      for (int h = 0; h < 2; ++h) {
        for (int s = 0; s < Op::kSums; ++s) {
          float* to = lanes + s * stride + i + 16 * h;
          const Mask m = part(live, h);
          _mm512_mask_storeu_ps(to, m, _mm512_add_ps(_mm512_maskz_loadu_ps(m, to), sum[h][s]));
        }
      }
    }
  });
}

template <class Format, class Op>
constexpr DirectOps direct_ops() {
  return {forward_uniform<Format, Op>,         forward_lanes<Format, Op>,
          {backward_uniform<Format, Op, false>, backward_uniform<Format, Op, true>},
          {backward_lanes<Format, Op, false>,   backward_lanes<Format, Op, true>}};
}

}  // namespace direct
}  // namespace
}  // namespace ctk::cpu
