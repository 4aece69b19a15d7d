// The gated product phi(gate) * up of an MLP with a CT unit. Its arithmetic is the unit's.
#pragma once
#include "ctu.h"

namespace ctk {

struct CtuAndMulOp : CtuOp {
  static constexpr const char *kInput = "gate", *kFactor = "up";
  static constexpr bool kPrologue = false;
};

}  // namespace ctk
