"""Fusion of BatchNorms, residual sums and gated products into the CT unit's pass, in place and reversibly.

``trace`` traces a module's forward into a graph, on the copies of ``shadow``; ``leftovers`` removes placeholders that remain
after tracing. ``match`` finds the sites in the graph; ``layers`` and ``overrides`` recognise modules that run only torch's code.
``program`` is a module's generated forward, and ``site`` and ``gated`` are the calls in it, with ``fold`` and ``recompute`` for
BatchNorms. ``handle`` has ``fuse`` and the handle it returns.
"""

from .._renamed import renamed
from .handle import Fusion, fuse
from .site import FusedSite

__all__ = ["FusedSite", "Fusion", "fuse"]
__getattr__ = renamed(__name__, {"Site": "FusedSite"})
