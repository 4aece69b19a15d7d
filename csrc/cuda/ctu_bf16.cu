#include "ctu.cuh"

namespace ctk::cuda {
CTK_CTU(bf16, BFloat16, one, 1)
CTK_CTU(bf16, BFloat16, wide, 8)
CTK_CHANNELWISE(logistic, Logistic<BFloat16>, bf16, BFloat16, lean, false, 8)
}  // namespace ctk::cuda
