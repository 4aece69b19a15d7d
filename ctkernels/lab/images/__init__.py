"""Images: data sets, pretrained networks, and linear probes on their features."""
