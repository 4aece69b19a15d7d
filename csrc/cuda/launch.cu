// Entry points of the kernel library. It loads on any machine; only a launch needs a GPU.
#include <cstring>

#include "../scalar.h"
#include "kernel.cuh"
#include "launch.h"

using namespace ctk::cuda;

CTK_EXPORT const char* ctk_cuda_launch(const Launch* launch) {
  const Entry* e = Entry::first();
  while (e && std::strcmp(e->name, launch->kernel)) e = e->next;
  if (!e) return "no such kernel";
  void* args[] = {const_cast<void*>(launch->args)};
  const cudaError_t error = cudaLaunchKernel(e->function, launch->grid, dim3(launch->block_x, launch->block_y), args,
                                             launch->shared, static_cast<cudaStream_t>(launch->stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// The architectures that setup.py compiled this library for: "sm_80 ... compute_120".
CTK_EXPORT const char* ctk_cuda_architectures() { return CTK_ARCHITECTURES; }

// Name of kernel i; null past the last.
CTK_EXPORT const char* ctk_cuda_kernel(int i) {
  const Entry* e = Entry::first();
  while (e && i-- > 0) e = e->next;
  return e ? e->name : nullptr;
}
