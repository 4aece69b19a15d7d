"""timm's architectures, steered, fused and adapted: ``make zoo`` runs all of them, ``tests/models/test_timm_zoo.py`` a few.

``choose`` says which architectures and on what input, ``check`` what has to hold of one, ``guard`` runs each in a process of its
own, so that a crash of the interpreter is a finding and not the end.
"""
