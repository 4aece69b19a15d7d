"""The attention kernels in Triton: forward, backward and decoding, and their launches."""
