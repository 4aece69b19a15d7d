// A kernel under a plain name, known to `find_kernel` by that name.
#pragma once

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

// Whether a kernel is one of those that -DCTK_SELECT=" NAME NAME " asks for: all, without it.
constexpr bool selected([[maybe_unused]] const char* name) {
#if defined(CTK_SELECT)
  const char* list = CTK_SELECT;
  for (; *list; ++list) {
    if (*list != ' ') continue;
    const char *a = list + 1, *b = name;
    while (*b && *a == *b) ++a, ++b;
    if (!*b && *a == ' ') return true;
  }
  return false;
#else
  return true;
#endif
}

}  // namespace ctk::cuda

#define CTK_KERNEL(NAME, THREADS, ARGS, ...)                                                                 \
  extern "C" __global__ void __launch_bounds__(THREADS) NAME([[maybe_unused]] const __grid_constant__ ARGS a) { \
    if constexpr (ctk::cuda::selected(#NAME)) __VA_ARGS__(a);                                                \
  }                                                                                                          \
  static const ctk::cuda::Entry NAME##_entry(#NAME, reinterpret_cast<const void*>(NAME));
