"""Predicts the time of every GPU kernel from its machine code, without a GPU: ``python -m roofline``."""
