#include "kernels.h"

#include <cstdlib>
#include <string_view>

namespace ctk::cpu {

extern const KernelTable baseline;
#if defined(__x86_64__)
extern const KernelTable avx2, avx512;
#endif

// The widest level that this machine supports and torch's switch, ATEN_CPU_CAPABILITY, allows.
const KernelTable& kernel_table() {
  static const KernelTable& widest = []() -> const KernelTable& {
#if defined(__x86_64__)
    const char* capability = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string_view most = capability ? capability : "";
    if (most == "default") return baseline;
    __builtin_cpu_init();
    if (most != "avx2" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return avx2;
#endif
    return baseline;
  }();
  return widest;
}

}  // namespace ctk::cpu

CTK_EXPORT const char* ctk_simd_level() {
  return ctk::cpu::kernel_table().level;
}
