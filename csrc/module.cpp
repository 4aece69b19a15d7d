// Loading the module registers the ops; its functions are those of cpu/eager.cpp. Py_LIMITED_API comes from the build.
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

// Facts about the build, for `ctkernels env`, which reads them with ctypes: an extension module of its own would have to be
// compiled for every Python. Beside these, cpu/simd.cpp exports the level in use.
CTK_EXPORT const char* ctk_compiler() { return __VERSION__; }

CTK_EXPORT const char* ctk_simd_levels() {
#if defined(__x86_64__)
  return "baseline avx2 avx512";
#else
  return "baseline";
#endif
}
