// The interface between the driver (compiled once, for any machine) and the kernels (compiled once per SIMD level).
#pragma once
#include "../driver.h"

namespace ctk::cpu {

// Layout of the constants. kPlane: one set for a run, whose values belong to one channel. kLanes: a set per lane of a row;
// constant i of lane j is constants[i * stride + j]. kAffineLanes: one set, and the prologue's scale and shift per lane; for
// forward passes alone.
enum Layout : int { kPlane = 0, kLanes = 1, kAffineLanes = 2 };

// Rows per run, at most, unless values pass through buffers: every row is a stream of memory, and many slow each other down.
constexpr int64_t kRunRows = 4;

// The part of a tensor that a kernel call works on: n values with one set of constants, or rows of n lanes.
template <class T>
struct Run {
  Layout layout;
  int64_t offset, n;      // in values
  int64_t rows = 1, row;  // kLanes: this many rows, `row` values apart
  int64_t in, in_row;     // offset and row distance of tensors with the layout of x: differ from the others if packed
  int64_t lane = 0;       // kLanes: the first value's lane
  const T* constants;     // of the first lane
  int64_t stride = 1;     // 1: kPlane
  const T* scale;         // null: no prologue
  const T* shift;
  int64_t step() const { return layout == kPlane ? 0 : 1; }
};

// Block kernels work on a short run that is in L1 and in the compute type (float, or double for double): the driver handles
// dtypes, layouts and threads. Sum k is added to totals[k] in a plane, to lanes[k * stride + j] for lane j otherwise.
template <class T>
struct BlockKernels {
  int sums;  // of this variant, without the prologue's
  void (*forward[3])(const T* w, const T* factor, T* y, const Run<T>& run);  // [layout]; kAffineLanes: of one row
  void (*backward[2][2])(const T* w, const T* factor, const T* dy, T* dw, T* dfactor, const Run<T>& run, double* totals,
                         T* lanes);  // [layout][with sums]
};

// Staging of block kernels: conversion between dtypes, and the prologue.
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

// Memory kernels work in one pass from memory to memory, in any dtype. Pointers are to the run's first value.
struct MemoryCall {
  const Run<float>& run;
  const void *x, *residual, *factor, *dy = nullptr;  // null: absent
  void *y = nullptr, *dx = nullptr, *dresidual = nullptr, *dfactor = nullptr;  // null: not requested
  double* totals = nullptr;
  float* lanes = nullptr;
  bool stream = false;  // results bypass the caches; every row of them is aligned to 64 bytes
};
struct MemoryKernels {
  void (*forward[3][2])(MemoryCall);      // [layout][with a prologue]
  void (*backward[2][2][2])(MemoryCall);  // [layout][with a prologue][with sums]
};

struct KernelTable {
  const char* level;
  BlockKernels<float> f32[kKernels];
  BlockKernels<float> f16[kKernels];  // float arithmetic for results that are rounded to 16 bits
  BlockKernels<double> f64[kKernels];
  Staging<float> stage32;
  Staging<double> stage64;
  MemoryKernels memory[kDTypes][kKernels];  // null where block kernels are as good

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

// The kernels of the widest level that this machine supports.
const KernelTable& kernel_table();

}  // namespace ctk::cpu
