"""A fuzzer of the ops: ``make fuzz`` runs many random calls, ``tests/ops/test_fuzz.py`` a few hundred.

``tensors`` describes a tensor argument down to its strides, ``cases`` draws calls, ``oracle`` says what they have to give,
``check`` compares, ``shrink`` makes a failing case small, and prints it as a script.
"""
