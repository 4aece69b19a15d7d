// An importable module with nothing in it: loading it registers the ops. Py_LIMITED_API comes from the build.
#include <Python.h>

#include "scalar.h"

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
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
