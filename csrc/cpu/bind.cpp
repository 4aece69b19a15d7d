// The CPU implementations of the ops.
#include "../binding.h"
#include "driver.h"

STABLE_TORCH_LIBRARY_IMPL(ctkernels, CPU, m) { ctk::add_to<ctk::cpu::Driver>(m); }

// The schemas that the channelwise kernels are compiled for, one per line; the tests compare them with Python's.
CTK_EXPORT const char* ctk_schemas() {
  static const std::string text = std::string()
#define CTK_OP(name, Op, ...) + ctk::Channelwise<ctk::cpu::Driver, ctk::Op>::schema() + "\n"
#include "../ops.def"
      ;
  return text.c_str();
}
