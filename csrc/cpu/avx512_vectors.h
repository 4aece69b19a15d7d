// AVX-512 vectors: loads and stores of each dtype, and the arithmetic of some ops.
// Compiled from the scalar headers, the CT unit's loop is bound by instructions. This is the formula of ctu.h with masks for
// values beyond a limit. In bfloat16 and half the exponential is shorter, and reciprocals are the 14-bit estimates of the
// hardware: relative errors of 9e-5 (2^f), 6e-5 (log1p) and 6e-5 (1/d), a fraction of half an ulp of either type.
// The head edit, except in double, is bound by memory access.
#pragma once
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns about its own intrinsics (its bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <array>
#include <concepts>
#include <utility>

#include "../ops.def"

namespace ctk::cpu {
namespace {
namespace avx512 {

using V = __m512;
using Mask = __mmask16;

inline V all(float v) { return _mm512_set1_ps(v); }
inline __m512i bits(V v) { return _mm512_castps_si512(v); }
inline V real(__m512i v) { return _mm512_castsi512_ps(v); }

// N vectors of 16 consecutive values. `live`: the mask of the values within a run.
template <int N>
struct Vectors {
  V v[N];
};
using Pair = Vectors<2>;

constexpr __mmask32 kFull = ~__mmask32(0);
inline Mask part(__mmask32 live, int h) { return static_cast<Mask>(live >> 16 * h); }

// Calls f(0), ..., f(N - 1) with compile-time constants, so that arrays they index stay in registers.
template <int N, class F>
CTK_HD void unrolled(const F& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

// ---- transcendental functions -------------------------------------------------------------------------------------

// See horner in scalar.h.
template <class C, int i = 0>
CTK_HD V horner(V x, V p = _mm512_setzero_ps()) {
  if constexpr (i == kTerms<C>) {
    return p;
  } else {
    constexpr float c = C::k[i];
    return horner<C, i + 1>(x, i == 0 ? all(c) : _mm512_fmadd_ps(p, x, all(c)));
  }
}

// Transcendental functions for results in float.
struct ExactMath {
  struct Rate {
    V hi, lo, limit;
  };
  template <class Field>
  static Rate rate(const Field& field, int first) { return {field(first), field(first + 1), field(first + 2)}; }

  // e^(-rate a) where `near`, else 0.
  static V decay(V a, const Rate& rate, Mask near) {
    const V magic = all(kRoundMagic), z = _mm512_fnmadd_ps(a, rate.hi, magic);
    V f = _mm512_fnmadd_ps(a, rate.hi, _mm512_sub_ps(magic, z));
    f = _mm512_fnmadd_ps(a, rate.lo, f);
    return real(_mm512_maskz_add_epi32(near, bits(horner<Exact::Exp2>(f)), _mm512_slli_epi32(bits(z), 23)));
  }
  using Log1p = Exact::Log1p;  // log(1 + e) / e
  static V inverse(V d) { return _mm512_div_ps(all(1.f), d); }
};

// Transcendental functions for results rounded to 16 bits.
struct FastMath {
  struct Rate {
    V ulps, limit;
  };
  // The rate times 2^23: in units of a float's last bit. Rates beyond the cap matter only for values below 1e-29.
  template <class Field>
  static Rate rate(const Field& field, int first) {
    return {_mm512_mul_ps(_mm512_min_ps(field(first), all(4e31f)), all(8388608.f)), field(first + 2)};
  }

  // The bits of (127 - a rate) 2^23 hold the exponent's floor and fraction; a cubic that maps [1, 2) to [1, 2) turns the fraction
  // into a significand.
  static V decay(V a, const Rate& rate, Mask near) {
    const __m512i low = _mm512_set1_epi32(0x7fffff);
    const __m512i z = _mm512_cvtps_epi32(_mm512_fnmadd_ps(a, rate.ulps, all(1065353216.f)));
    const V g = real(_mm512_ternarylogic_epi32(z, low, _mm512_set1_epi32(0x3f800000), 0xea));  // (z & low) | 1.0
    V p = _mm512_fmadd_ps(all(0.07706496f), g, all(-0.0035463814f));
    p = _mm512_fmadd_ps(p, g, all(0.471013f));
    p = _mm512_fmadd_ps(p, g, all(0.45546862f));
    return real(_mm512_maskz_ternarylogic_epi32(near, bits(p), z, low, 0xe4));  // p's low bits, z's others
  }
  using Log1p = Fast::Log1p;
  static V inverse(V d) { return _mm512_rcp14_ps(d); }
};

// ---- dtypes --------------------------------------------------------------------------------------------------------

CTK_HD void store_words(uint16_t* p, __mmask32 live, bool stream, __m512i words) {
  if (stream && live == kFull) _mm512_stream_si512(reinterpret_cast<__m512i*>(p), words);
  else _mm512_mask_storeu_epi16(p, live, words);
}

struct BFloat16 {
  using Math = FastMath;
  using Value = uint16_t;
  static constexpr int kVectors = 2;
  static Pair load(const Value* p, __mmask32 live) {
    const __m512i raw = _mm512_maskz_loadu_epi16(live, p);
    // word i to the high half of lane i, zeros below
    const __m512i low = _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, words<0, 1>(), raw);
    const __m512i high = _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, words<16, 1>(), raw);
    return {{real(low), real(high)}};
  }
  template <bool even>
  static void store(Value* p, __mmask32 live, bool stream, const Pair& y) {
    const __m512i both = _mm512_permutex2var_epi16(rounded<even>(y.v[0]), words<1, 4>(), rounded<even>(y.v[1]));
    store_words(p, live, stream, both);
  }

 private:
  // Rounds to nearest, in the high half of each lane: ties to even if the op's results can be ties, else away from zero. Only
  // NaNs with a low half of zeros occur, and stay NaN.
  template <bool even>
  static __m512i rounded(V v) {
    if constexpr (!even) return _mm512_add_epi32(bits(v), _mm512_set1_epi32(0x8000));
    const __mmask16 odd = _mm512_test_epi32_mask(bits(v), _mm512_set1_epi32(0x10000));
    const __m512i down = _mm512_add_epi32(bits(v), _mm512_set1_epi32(0x7fff));
    return _mm512_mask_add_epi32(down, odd, bits(v), _mm512_set1_epi32(0x8000));
  }
  // A vector of indices: word j is from + j step / 2.
  template <int from, int step>
  static __m512i words() {
    alignas(64) static constexpr auto index = [] {
      std::array<int16_t, 32> t{};
      for (int j = 0; j < 32; ++j) t[j] = static_cast<int16_t>(from + j * step / 2);
      return t;
    }();
    return _mm512_load_si512(index.data());
  }
};

struct Half {
  using Math = FastMath;
  using Value = uint16_t;
  static constexpr int kVectors = 2;
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
  using Math = ExactMath;
  using Value = float;
  static constexpr int kVectors = 1;  // sums and constants for two do not fit the registers
  static Vectors<1> load(const Value* p, __mmask32 live) { return {{_mm512_maskz_loadu_ps(part(live, 0), p)}}; }
  template <bool>
  static void store(Value* p, __mmask32 live, bool stream, const Vectors<1>& y) {
    if (stream && part(live, 0) == part(kFull, 0)) _mm512_stream_ps(p, y.v[0]);
    else _mm512_mask_storeu_ps(p, part(live, 0), y.v[0]);
  }
};

// An op's arithmetic on 16 values at a time, for ops that gain from it. kTiesToEven: results can systematically lie halfway
// between two 16-bit values. Shared: a forward pass for many values with the same constants. A derived op inherits it.
template <class Op, typename Op::Variant variant, class Math>
struct Arithmetic {
  static constexpr int kSums = 0;  // none
};

// ---- the CT unit ---------------------------------------------------------------------------------------------------

template <class Op, typename Op::Variant variant, class Math>
  requires std::derived_from<Op, CtuOp> && (variant == CtuOp::Variant::kLogistic)
struct Arithmetic<Op, variant, Math> {
  static constexpr int kSums = CtuOp::kSumSlope;
  static constexpr bool kTiesToEven = false;
  using Rate = typename Math::Rate;
  using Log1p = typename Math::Log1p;
  Rate t, u;
  V c, c1, c1s, c_eta;

  template <class Field>  // field(i): the vector of constant i
  explicit Arithmetic(const Field& field)
      : t(Math::rate(field, CtuOp::kTHi)), u(Math::rate(field, CtuOp::kUHi)), c(field(CtuOp::kC)), c1(field(CtuOp::kC1)), c1s(field(CtuOp::kC1S)),
        c_eta(_mm512_mul_ps(field(CtuOp::kC), field(CtuOp::kEta))) {}

  // base - c a et / (1 + et) + (1 - c) s log1p(eu).
  V forward(V w) const {
    const Parts p(w, t, u);
    const V ratio = _mm512_div_ps(_mm512_mul_ps(c, p.a), _mm512_add_ps(p.et, all(1.f)));
    return _mm512_fmadd_ps(_mm512_mul_ps(c1s, horner<Log1p>(p.eu)), p.eu, p.base_less(ratio));
  }

  // The gradient of w; with `sums`, adds the terms of the sums.
  template <bool sums>
  V backward(V w, V dy, V* sum) const {
    const auto [a, base, t_near, u_near, et, eu] = Parts(w, t, u);
    const V one = all(1.f);
    const V pt = Math::inverse(_mm512_add_ps(et, one)), pu = Math::inverse(_mm512_add_ps(eu, one));
    const V qt = _mm512_mul_ps(et, pt), qu = _mm512_mul_ps(eu, pu);
    const V ap = _mm512_maskz_mul_ps(t_near, a, pt);
    const V h = _mm512_fmadd_ps(qt, _mm512_fnmadd_ps(c_eta, ap, c), _mm512_mul_ps(c1, qu));
    const Mask up = _mm512_cmp_ps_mask(w, _mm512_setzero_ps(), _CMP_GT_OQ);
    if constexpr (sums) {
      const V s1 = _mm512_mul_ps(dy, _mm512_maskz_mul_ps(t_near, a, qt));
      sum[0] = _mm512_fmadd_ps(s1, ap, sum[0]);
      sum[1] = _mm512_add_ps(sum[1], s1);
      sum[2] = _mm512_fmadd_ps(_mm512_mul_ps(dy, eu), horner<Log1p>(eu), sum[2]);
      sum[3] = _mm512_mask3_fmadd_ps(_mm512_mul_ps(dy, qu), a, sum[3], u_near);
    }
    return _mm512_mul_ps(dy, _mm512_mask_sub_ps(h, up, one, h));
  }

  // The forward pass for many values with the same constants: two products fewer, at the price of more constants.
  struct Shared {
    Rate t, u;
    V c_inverse, scaled_log1p[kTerms<Log1p>];  // 1 / c, and the coefficients of (1 - c) s log1p(e) / e

    template <class Field>
    explicit Shared(const Field& field)
        : t(Math::rate(field, CtuOp::kTHi)), u(Math::rate(field, CtuOp::kUHi)), c_inverse(_mm512_div_ps(all(1.f), field(CtuOp::kC))) {
      unrolled<kTerms<Log1p>>([&](auto i) { scaled_log1p[i] = _mm512_mul_ps(field(CtuOp::kC1S), all(Log1p::k[i])); });
    }

    V forward(V w) const {
      const Parts p(w, t, u);
      const V ratio = _mm512_div_ps(p.a, _mm512_fmadd_ps(p.et, c_inverse, c_inverse));  // c = 0: a division by infinity
      V log1p = scaled_log1p[0];
      unrolled<kTerms<Log1p> - 1>([&](auto i) __attribute__((always_inline)) {
        log1p = _mm512_fmadd_ps(log1p, p.eu, scaled_log1p[i + 1]);
      });
      return _mm512_fmadd_ps(log1p, p.eu, p.base_less(ratio));
    }
  };

 private:
  static Mask within(V a, V limit) { return _mm512_cmp_ps_mask(a, limit, _CMP_NGT_UQ); }  // true for NaN

  struct Parts {
    V a, base;
    Mask t_near, u_near;
    V et, eu;

    Parts(V w, const Rate& t, const Rate& u)
        : a(_mm512_abs_ps(w)), base(_mm512_max_ps(w, _mm512_setzero_ps())), t_near(within(a, t.limit)),
          u_near(within(a, u.limit)), et(Math::decay(a, t, t_near)), eu(Math::decay(a, u, u_near)) {}
    // base - ratio et; base if a is infinite.
    V base_less(V ratio) const { return _mm512_mask3_fnmadd_ps(et, ratio, base, t_near); }
  };
};

// ---- the head edit -------------------------------------------------------------------------------------------------

template <class Math>
struct Arithmetic<HeadEditOp, HeadEditOp::Variant::kOnly, Math> {
  static constexpr int kSums = HeadEditOp::kSums;
  static constexpr bool kTiesToEven = true;
  using Shared = Arithmetic;
  V p, q;

  template <class Field>
  explicit Arithmetic(const Field& field) : p(field(HeadEditOp::kScale)), q(field(HeadEditOp::kOffset)) {}

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

}  // namespace avx512
}  // namespace
}  // namespace ctk::cpu
