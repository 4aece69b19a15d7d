"""Convolution with frozen weights: the backward pass needs the weights but not the input, which torch's own saves."""
