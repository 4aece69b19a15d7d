"""Moved to :mod:`ctkernels.lab.report`."""

raise ModuleNotFoundError(
    "ctkernels.report is now ctkernels.lab.report; gate_map, edit_sizes and plot_gates are in ctkernels.adapters",
    name=__name__,
)
