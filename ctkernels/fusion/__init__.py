"""Fusion: the CT unit takes the BatchNorm and the residual sum before it into its one pass, in place and reversibly.

``trace`` reads a module's forward as a graph, on the copies of ``shadow``, and ``leftovers`` makes sure that nothing of the
reading stays. ``match`` finds the sites in the graph; ``layers`` and ``overrides`` tell which modules run torch's own code.
``program`` is the forward that a module gets, and ``site`` the call in it that stands for a site, with ``fold`` and ``recompute``
for its BatchNorms. ``handle`` holds ``fuse`` and what the user gets from it.
"""

from .._renamed import renamed
from .handle import Fusion, fuse
from .site import FusedSite

__all__ = ["FusedSite", "Fusion", "fuse"]
__getattr__ = renamed(__name__, {"Site": "FusedSite"})
