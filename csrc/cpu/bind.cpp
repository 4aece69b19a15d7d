// The CPU implementations of the ops.
#include "../binding.h"
#include "driver.h"

namespace {

struct Cpu {
  explicit Cpu(const torch::stable::Tensor&) {}
  template <class Op, class... T>
  void forward(const T&... arguments) {
    ctk::cpu::forward<Op>(arguments...);
  }
  template <class Op, class... T>
  void backward(const T&... arguments) {
    ctk::cpu::backward<Op>(arguments...);
  }
  void gates_forward(bool is_double, const ctk::Gates& gates) { ctk::cpu::gates_forward(is_double, gates); }
  void gates_backward(bool is_double, const ctk::Gates& gates) { ctk::cpu::gates_backward(is_double, gates); }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ctkernels, CPU, m) { ctk::add_to<Cpu>(m); }

// The schemas that the channelwise kernels are compiled for, one a line: the tests hold Python's to them.
extern "C" __attribute__((visibility("default"))) const char* ctk_schemas() {
  static const std::string text = std::string()
#define CTK_OP(name, Op, ...) + ctk::Channelwise<Cpu, ctk::Op>::schema() + "\n"
#include "../ops.def"
      ;
  return text.c_str();
}
