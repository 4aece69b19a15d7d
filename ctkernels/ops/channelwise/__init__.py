"""The Triton skeleton of channelwise ops: partition, kernels and launches."""
