"""Moved to :mod:`ctkernels.lab`."""

raise ModuleNotFoundError("ctkernels.recipes is now ctkernels.lab", name=__name__)
