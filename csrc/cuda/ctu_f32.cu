#include "ctu.cuh"

namespace ctk::cuda {
CTK_CTU(f32, float, one, 1)
CTK_CTU(f32, float, wide, 4)
CTK_CHANNELWISE(logistic, Logistic<float>, f32, float, lean, false, 4)
}  // namespace ctk::cuda
