#include "block.h"

namespace ctk::cpu {

#if defined(__x86_64__)
extern const BlockTable avx2, avx512;

const BlockTable* block_table() {
  static const BlockTable* const best = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      return &avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return &avx2;
    return static_cast<const BlockTable*>(nullptr);
  }();
  return best;
}
#else
extern const BlockTable baseline;

const BlockTable* block_table() { return &baseline; }
#endif

}  // namespace ctk::cpu

extern "C" __attribute__((visibility("default"))) const char* ctk_simd_level() {
  const auto* table = ctk::cpu::block_table();
  return table ? table->name : nullptr;
}
