// What the native build can tell about itself, for `python -m ctkernels env`.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/ops.h>

#include <sstream>
#include <string>
#include <thread>

namespace py = pybind11;

PYBIND11_MODULE(_introspect, m) {
  m.doc() = "Introspection of the native kernels.";
  m.def(
      "simd_level",
      [](const std::string& library) -> py::object {
        void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_NOLOAD);
        if (!handle) throw py::value_error(library + " is not loaded");
        const auto level = reinterpret_cast<const char* (*)()>(dlsym(handle, "ctk_simd_level"));
        dlclose(handle);
        if (!level) throw py::value_error(library + " does not export ctk_simd_level");
        return py::str(level());
      },
      py::arg("library"), "SIMD level that the CPU kernels in `library` run at on this machine.");
  m.def("simd_levels", [] {
#if defined(__x86_64__)
    return py::make_tuple("baseline", "avx2", "avx512");
#else
    return py::make_tuple("baseline");
#endif
  }, "SIMD levels compiled in.");
  m.def(
      "cuda_architectures",
      [](const std::string& library) {
        void* handle = dlopen(library.c_str(), RTLD_LAZY);
        if (!handle) throw py::value_error(dlerror());
        const auto architectures = reinterpret_cast<const char* (*)()>(dlsym(handle, "ctk_cuda_architectures"));
        if (!architectures) throw py::value_error(library + " does not export ctk_cuda_architectures");
        py::list found;
        std::istringstream words(architectures());
        for (std::string word; words >> word;) found.append(word);
        dlclose(handle);
        return py::tuple(found);
      },
      py::arg("library"), "GPU architectures that the kernels in `library` were compiled for: sm_N, and compute_N for PTX.");
  m.def(
      "cuda_kernels",
      [](const std::string& library) {
        void* handle = dlopen(library.c_str(), RTLD_LAZY);
        if (!handle) throw py::value_error(dlerror());
        const auto kernel = reinterpret_cast<const char* (*)(int)>(dlsym(handle, "ctk_cuda_kernel"));
        if (!kernel) throw py::value_error(library + " does not export ctk_cuda_kernel");
        py::list found;
        for (int i = 0; const char* name = kernel(i); ++i) found.append(name);
        dlclose(handle);
        return py::tuple(found);
      },
      py::arg("library"), "Names of the CUDA kernels in `library`.");
  m.def("threads", [] { return torch::stable::get_num_threads(); }, "Threads a CPU kernel may use now.");
  m.def("compiler", [] { return std::string(__VERSION__); }, "The compiler that built the native code.");
}
