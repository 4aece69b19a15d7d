// The seam between the driver (compiled once, for any machine) and the kernels (compiled once per SIMD level).
#pragma once
#include "../driver.h"

namespace ctk::cpu {

// How constants lie. kPlane: one set for a run of values, which belong to one channel. kLanes: one set per lane of a row,
// constant i of lane j at constants[i * stride + j].
enum Layout : int { kPlane = 0, kLanes = 1 };

// n values with one set of constants, or rows of n lanes.
template <class T>
struct Run {
  Layout layout;
  int64_t offset, n;      // in values
  int64_t rows = 1, row;  // kLanes: this many rows, `row` values apart
  int64_t in, in_row;     // offset and row of x, of what has its layout, and of their gradients: others if the view is packed
  int64_t lane = 0;       // kLanes: the first value's lane
  const T* constants;     // of the first lane
  int64_t stride = 1;     // 1: kPlane
  const T* scale;         // null: no prologue
  const T* shift;
  int64_t step() const { return layout == kLanes ? 1 : 0; }
};

// Sums go to totals[k] in a plane, and lane j's to lanes[k * stride + j].
//
// Block kernels run over a short run of values that are already in the compute type (float, or double for double) and in
// L1: dtypes, layouts and threads are the driver's business.
template <class T>
struct BlockKernels {
  int sums;  // of this variant: the op's own, and not the prologue's
  int rows;  // that lane kernels take at once
  void (*forward[2])(const T* w, const T* factor, T* y, const Run<T>& run);  // [layout]
  void (*backward[2][2])(const T* w, const T* factor, const T* dy, T* dw, T* dfactor, const Run<T>& run, double* totals,
                         T* lanes);  // [layout][with sums]
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

// Memory kernels do all in one pass from memory to memory, in any dtype.
struct MemoryCall {
  const Run<float>& run;
  const void *x, *residual, *factor, *dy = nullptr;  // of the run's first value; null: there is none
  void *y = nullptr, *dx = nullptr, *dresidual = nullptr, *dfactor = nullptr;  // null: not wanted
  double* totals = nullptr;
  float* lanes = nullptr;
  bool stream = false;  // results bypass the caches; every row of them is aligned to 64 bytes
};
struct MemoryKernels {
  void (*forward[2][2])(MemoryCall);      // [layout][with a prologue]
  void (*backward[2][2][2])(MemoryCall);  // [layout][with a prologue][with sums]
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
    return kernels.forward[kPlane][prologue] ? &kernels : nullptr;
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
