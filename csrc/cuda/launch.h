// The launch interface. Kernels are in a library of their own (launch.cu), which needs the CUDA runtime but not torch; whoever
// loads it stores its `ctk_cuda_launch` in `ctk_cuda_launcher` (bind.cpp).
#pragma once
#include <cstdint>

namespace ctk::cuda {

struct Scratch {
  const void* data;
  int64_t bytes;
};

struct Launch {
  const char* kernel;
  uint32_t grid, block_x, block_y, shared;
  const void* args;  // the kernel's only argument
  uint64_t args_size;
  void* stream;
  const Scratch* scratch;  // the call's allocations so far, for a recording launcher
  int32_t scratch_count;
};

// Returns null, or an error message.
using Launcher = const char* (*)(const Launch*);

}  // namespace ctk::cuda
