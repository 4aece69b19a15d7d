"""Images: data sets, how they are read and split, pretrained networks, and probes on their features."""
