// phi(gate) * up: the CT unit of a gated MLP, and the product it enters. Its arithmetic is the unit's.
#pragma once
#include "ctu.h"

namespace ctk {

struct CtuAndMulOp : CtuOp {
  static constexpr const char *kInput = "gate", *kFactor = "up";
  static constexpr bool kPrologue = false;
};

}  // namespace ctk
