// The list of kernels by name, in which launch.cu looks them up.
#pragma once
#include <string_view>

namespace ctk::cuda {

struct Entry {
  const char* name;
  const void* function;
  const Entry* next;
  static const Entry*& first() {
    static const Entry* entries = nullptr;
    return entries;
  }
  Entry(const char* n, const void* f) : name(n), function(f), next(first()) { first() = this; }
};

}  // namespace ctk::cuda

// -DCTK_SELECT=" NAME NAME " compiles only these kernels; the bodies of all others stay empty.
#if defined(CTK_SELECT)
#define CTK_SELECTED(NAME) (std::string_view(CTK_SELECT).find(" " NAME " ") != std::string_view::npos)
#else
#define CTK_SELECTED(NAME) true
#endif

#define CTK_KERNEL(NAME, THREADS, ARGS, ...)                                                                 \
  extern "C" __global__ void __launch_bounds__(THREADS) NAME([[maybe_unused]] const __grid_constant__ ARGS a) { \
    if constexpr (CTK_SELECTED(#NAME)) __VA_ARGS__(a);                                                \
  }                                                                                                          \
  static const ctk::cuda::Entry NAME##_entry(#NAME, reinterpret_cast<const void*>(NAME));
