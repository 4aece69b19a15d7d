"""timm's architectures, steered, fused and adapted: ``make zoo`` runs all of them, ``tests/models/test_timm_zoo.py`` a few.

``choose`` selects the architectures and their inputs, ``check`` checks one, ``guard`` runs each in its own process, so that a
crash of the interpreter is reported as a finding.
"""
