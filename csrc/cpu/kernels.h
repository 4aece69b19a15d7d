// The seam between the driver (compiled once, for any machine) and the kernels (compiled once per SIMD level).
#pragma once
#include "../driver.h"

namespace ctk::cpu {

// How constants lie. kPlane: one set for a run of values, which belong to one channel. kLanes: one set per lane of a row,
// constant i of lane j at constants[i * stride + j]; a kernel takes `rows` rows of n lanes, `row` values apart.
enum Layout : int { kPlane = 0, kLanes = 1 };

// Sums go to totals[k] in a plane, and lane j's to lanes[k * stride + j].
//
// Block kernels run over a short run of values that are already in the compute type (float, or double for double) and in
// L1: dtypes, layouts and threads are the driver's business.
template <class T>
struct BlockKernels {
  int sums;  // of this variant: the op's own, and not the prologue's
  int rows;  // that lane kernels take at once
  void (*forward_plane)(const T* w, T* y, const T* constants, int64_t n);
  void (*forward_lanes)(const T* w, T* y, const T* constants, int64_t stride, int64_t rows, int64_t row, int64_t n);
  // [with sums]
  void (*backward_plane[2])(const T* w, const T* dy, T* dw, const T* constants, double* totals, int64_t n);
  void (*backward_lanes[2])(const T* w, const T* dy, T* dw, const T* constants, int64_t stride, T* lanes, int64_t rows,
                            int64_t row, int64_t n);
};

// Between memory and block kernels: dtypes and the prologue.
template <class T>
struct Staging {
  void (*load[kDTypes])(const void* from, T* to, int64_t n);
  void (*store[kDTypes])(const T* from, void* to, int64_t n);
  // w = scale x + shift (+ residual); scale and shift advance by `step` (0 or 1) per lane.
  void (*prologue)(const T* x, const T* residual, const T* scale, const T* shift, int64_t step, T* w, int64_t n);
  void (*scaled)(const T* g, const T* scale, int64_t step, T* dx, int64_t n);
  void (*prologue_plane_sums)(const T* g, const T* x, double* totals, int64_t n);
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

// Memory kernels do all in one pass from memory to memory, in any dtype. dx may be null; `prologue` is null for [0] and not
// for [1]. `stream`: results bypass the caches; every row of them is aligned to 64 bytes then.
struct MemoryKernels {
  // [with a prologue]
  void (*forward_plane[2])(const void* x, void* y, const float* constants, const Prologue* prologue, int64_t n, bool stream);
  void (*forward_lanes[2])(const void* x, void* y, const float* constants, int64_t stride, const Prologue* prologue,
                           int64_t rows, int64_t row, int64_t n, bool stream);
  // [with a prologue][with sums]
  void (*backward_plane[2][2])(const void* x, const void* dy, void* dx, const float* constants, const Prologue* prologue,
                               double* totals, int64_t n, bool stream);
  void (*backward_lanes[2][2])(const void* x, const void* dy, void* dx, const float* constants, int64_t stride,
                               const Prologue* prologue, float* lanes, int64_t rows, int64_t row, int64_t n, bool stream);
};

struct KernelTable {
  const char* level;
  BlockKernels<float> f32[kKernels];
  BlockKernels<float> f16[kKernels];  // float arithmetic for results that are rounded to 16 bits
  BlockKernels<double> f64[kKernels];
  Staging<float> stage32;
  Staging<double> stage64;
  MemoryKernels memory[kDTypes][kKernels];  // empty where this level has nothing better than the above

  const MemoryKernels* memory_kernels(Kernel k, DType t, bool prologue) const {
    const MemoryKernels& kernels = memory[static_cast<int>(t)][static_cast<int>(k)];
    return kernels.forward_plane[prologue] ? &kernels : nullptr;
  }
  template <class T>
  const BlockKernels<T>& block_kernels(Kernel k, DType t) const {
    if constexpr (sizeof(T) == 8) return f64[static_cast<int>(k)];
    else return (t == DType::kFloat ? f32 : f16)[static_cast<int>(k)];
  }
  template <class T>
  const Staging<T>& staging() const {
    if constexpr (sizeof(T) == 8) return stage64;
    else return stage32;
  }
};

// The widest level that this machine can run.
const KernelTable& kernel_table();

}  // namespace ctk::cpu
