// Bound by double precision, not by memory: one value a thread is enough.
#include "ctu.cuh"

namespace ctk::cuda {
CTK_CTU(f64, double, one, 1)
}  // namespace ctk::cuda
