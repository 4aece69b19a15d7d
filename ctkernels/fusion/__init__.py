"""Fusion: the CT unit takes the BatchNorm and the residual sum before it into its one pass, in place and reversibly.

``trace`` reads a module's forward as a graph, ``match`` finds what can be fused in it, ``site`` is what then runs, on
weights that ``fold`` prepares and ``frozen`` calls, ``program`` is the forward a module gets, ``handle`` is what the user holds.
"""

from .handle import Fusion, fuse
from .site import Site

__all__ = ["Fusion", "Site", "fuse"]
