"""Predictions of GPU kernel times from machine code, without a GPU: ``python -m roofline``."""
