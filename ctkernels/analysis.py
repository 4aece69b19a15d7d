"""Moved to :mod:`ctkernels.lab.analysis`."""

raise ModuleNotFoundError("ctkernels.analysis is now ctkernels.lab.analysis", name=__name__)
