"""A frozen linear layer of edited heads, with the edit in the layer's weights instead of in its input."""
