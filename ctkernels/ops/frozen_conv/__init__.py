"""Convolutions whose weights need no gradient: their backward pass needs the weights and not the input, which torch's own
keeps."""
