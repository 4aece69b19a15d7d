// The extension module: loading it registers the ops, and its functions are those of cpu/eager.cpp. The build sets
// Py_LIMITED_API.
#include <Python.h>

#include "scalar.h"

namespace ctk::cpu {
PyMethodDef* eager_entries();
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, ctk::cpu::eager_entries(),
                               nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

// Build information for `ctkernels env`, which reads it with ctypes. cpu/dispatch.cpp exports the SIMD level in use.
CTK_EXPORT const char* ctk_compiler() { return __VERSION__; }

CTK_EXPORT const char* ctk_simd_levels() {
#if defined(__x86_64__)
  return "baseline avx2 avx512";
#else
  return "baseline";
#endif
}
