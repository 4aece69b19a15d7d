"""A fuzzer of the ops: ``make fuzz`` runs many random calls, ``tests/ops/test_fuzz.py`` a few hundred.

``tensors`` describes tensor arguments including strides, ``cases`` generates calls, ``oracle`` computes expected results,
``check`` compares, ``report`` shrinks a failing case and prints it as a script.
"""
