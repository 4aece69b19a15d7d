"""Commands of the laboratory: each module has ``parser()`` and ``run(arguments)``."""
