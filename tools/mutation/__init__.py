"""Plants bugs in the compiled GPU kernels and counts what the tests notice: ``python -m mutation``."""
