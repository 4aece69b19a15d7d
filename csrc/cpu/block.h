// The seam between the driver (compiled once, for any machine) and the block kernels (compiled once per SIMD level).
// A block kernel runs one op over a short run of values that already sit in the compute type (float, or double for
// double), in L1: loads, stores, dtypes, layouts and threads are the driver's business.
#pragma once
#include <cstdint>

namespace ctk::cpu {

enum class DType : int { kFloat = 0, kDouble = 1, kBFloat16 = 2, kHalf = 3 };
inline constexpr int kDTypes = 4;
inline int64_t size_of(DType t) { return t == DType::kDouble ? 8 : t == DType::kFloat ? 4 : 2; }

enum class Kernel : int { kCtuLogistic = 0, kCtuLeaky, kCtuRelu6, kCtuGaussian, kHeadEdit };
inline constexpr int kKernels = 5;
inline constexpr int kMaxSums = 7;  // two of them the prologue's
inline constexpr int kMaxFields = 16;

// Kernels come in two modes: one set of constants for n values (`uniform`: fields contiguous), or one set per lane (field
// f of lane j at consts[f * stride + j]) for `rows` rows of n lanes, `row` values apart. Backward kernels: dw = dy * d/dw;
// those with sums add sum k into totals[k], or lane j's into lanes[k * stride + j].
template <class T>
struct BlockOps {
  int fields, sums;
  int rows;  // that the lane kernels take at once
  void (*forward_uniform)(const T* w, T* y, const T* consts, int64_t n);
  void (*forward_lanes)(const T* w, T* y, const T* consts, int64_t stride, int64_t rows, int64_t row, int64_t n);
  // [with sums]
  void (*backward_uniform[2])(const T* w, const T* dy, T* dw, const T* consts, double* totals, int64_t n);
  void (*backward_lanes[2])(const T* w, const T* dy, T* dw, const T* consts, int64_t stride, T* lanes, int64_t rows,
                            int64_t row, int64_t n);
};
enum Mode : int { kUniform = 0, kPerLane = 1 };

template <class T>
struct Staging {
  void (*load[kDTypes])(const void* from, T* to, int64_t n);
  void (*store[kDTypes])(const T* from, void* to, int64_t n);
  // w = scale x + shift (+ residual); scale and shift advance by `step` (0 or 1) a lane.
  void (*prologue)(const T* x, const T* residual, const T* scale, const T* shift, int64_t step, T* w, int64_t n);
  void (*scaled)(const T* g, const T* scale, int64_t step, T* dx, int64_t n);
  void (*prologue_uniform_sums)(const T* g, const T* x, double* totals, int64_t n);
  void (*prologue_lane_sums)(const T* g, const T* x, T* dscale, T* dshift, int64_t n);
};

// w = scale x + shift (+ residual) before an op, and the residual's gradient after it (null: not wanted). scale and shift
// are one value or one per lane, as the op's constants are; residuals are read and written at x's offsets.
struct Prologue {
  const float* scale;
  const float* shift;
  const void* residual;
  void* dresidual;
};

// The same from memory to memory, in any dtype; dx may be null, `prologue` is null for [0] and not for [1]. `stream`:
// results are written past the caches; every row of them is aligned to 64 bytes then.
struct DirectOps {
  // [with a prologue]
  void (*forward_uniform[2])(const void* x, void* y, const float* consts, const Prologue* prologue, int64_t n, bool stream);
  void (*forward_lanes[2])(const void* x, void* y, const float* consts, int64_t stride, const Prologue* prologue,
                           int64_t rows, int64_t row, int64_t n, bool stream);
  // [with a prologue][with sums]
  void (*backward_uniform[2][2])(const void* x, const void* dy, void* dx, const float* consts, const Prologue* prologue,
                                 double* totals, int64_t n, bool stream);
  void (*backward_lanes[2][2])(const void* x, const void* dy, void* dx, const float* consts, int64_t stride,
                               const Prologue* prologue, float* lanes, int64_t rows, int64_t row, int64_t n, bool stream);
};

struct BlockTable {
  const char* name;
  BlockOps<float> f32[kKernels];
  BlockOps<float> f16[kKernels];  // float arithmetic for results that are rounded to 16 bits
  BlockOps<double> f64[kKernels];
  Staging<float> stage32;
  Staging<double> stage64;
  DirectOps direct[kDTypes][kKernels];  // empty where this level has nothing better than the above

  const DirectOps* direct_ops(Kernel k, DType t, bool prologue) const {
    const DirectOps& ops = direct[static_cast<int>(t)][static_cast<int>(k)];
    return ops.forward_uniform[prologue] ? &ops : nullptr;
  }

  template <class T>
  const BlockOps<T>& ops(Kernel k, DType t) const {
    if constexpr (sizeof(T) == 8) return f64[static_cast<int>(k)];
    else return (t == DType::kFloat ? f32 : f16)[static_cast<int>(k)];
  }
  template <class T>
  const Staging<T>& stage() const {
    if constexpr (sizeof(T) == 8) return stage64;
    else return stage32;
  }
};

// The best table this machine can run.
const BlockTable* block_table();

}  // namespace ctk::cpu
