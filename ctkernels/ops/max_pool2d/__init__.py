"""Max pooling by torch's own kernels in compiled training steps.

On the CPU, the compiler's own backward pass of a pooling takes several times as long (docs/fusion.md).
``ctkernels::max_pool2d`` is opaque to the compiler and calls the eager kernels.
"""
