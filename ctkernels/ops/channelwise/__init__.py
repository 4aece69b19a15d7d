"""The Triton skeleton of channelwise ops: how a tensor is partitioned, the loops and sums, and the launches."""
