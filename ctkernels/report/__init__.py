"""What an adapter does, for people: gates by layer and head, and the inputs on which an edited head acts."""

from .edits import EditReport, edit_sizes
from .gates import GateMap, gate_map, plot_gates

__all__ = ["EditReport", "GateMap", "edit_sizes", "gate_map", "plot_gates"]
