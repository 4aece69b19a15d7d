"""Max pooling in compiled training steps, by torch's own kernels.

On the CPU the compiler writes the backward pass of a pooling itself, and what it writes takes several times as long
(docs/fusion.md). ``ctkernels::max_pool2d`` is opaque to it, and calls what eager code calls.
"""
