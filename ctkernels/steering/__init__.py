"""Steering: every activation of a model becomes a CT unit, in place and reversibly.

``activations`` says what an activation is, ``lookup`` and ``rewrite`` read source code, ``survey`` finds the sites,
``surgery`` changes modules and changes them back, ``unit`` is what then runs, ``handle`` is what the user holds.
"""

from .handle import Steering, handle_of, steer
from .scan import Site, Unsteered

__all__ = ["Site", "Steering", "Unsteered", "handle_of", "steer"]
