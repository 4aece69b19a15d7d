"""Fusion: the CT unit takes the BatchNorm and the residual sum before it into its one pass, in place and reversibly.

``trace`` reads a module's forward as a graph, on the copies of ``shadow``, and ``leftovers`` makes sure that nothing of that
stays anywhere; ``match`` finds what can be fused in it, among what ``layers`` knows; ``site`` is what then runs, with what
``fold`` makes of a BatchNorm and ``frozen`` of a layer; ``program`` is the forward a module gets, ``handle`` is what the user
holds.
"""

from .handle import Fusion, fuse
from .site import FusedSite

__all__ = ["FusedSite", "Fusion", "fuse"]
