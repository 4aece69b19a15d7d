#include "ctu.cuh"

namespace ctk::cuda {
CTK_CTU(f16, Half, one, 1)
CTK_CTU(f16, Half, wide, 8)
CTK_CHANNELWISE(logistic, Logistic<Half>, f16, Half, lean, false, 8)
}  // namespace ctk::cuda
