"""Mutation testing of the compiled GPU kernels: ``python -m mutation``."""
