// How kernels are launched. They live in a library of their own (launch.cu), which needs the CUDA runtime
// and nothing of torch; whoever loads it puts its `ctk_cuda_launch` into `ctk_cuda_launcher` (bind.cpp).
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
  const Scratch* scratch;  // what the call has allocated so far, for a launcher that records
  int32_t scratch_count;
};

// Null, or what went wrong.
using Launcher = const char* (*)(const Launch*);

}  // namespace ctk::cuda
