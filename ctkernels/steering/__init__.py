"""Steering: replaces every activation of a model by a CT unit, in place and reversibly.

``activations`` lists the activations that can be steered. ``scan`` finds a model's sites, in its modules and (``names``,
``source``, ``rewrite``) in its source code. ``patch`` applies and reverts the changes, ``runtime`` has the replacements for
activation calls, and ``handle`` has ``steer`` and the handle it returns.
"""

from .._renamed import renamed
from .handle import Steering, handle_of, steer
from .scan import Site, Unsteered

__all__ = ["Site", "Steering", "Unsteered", "handle_of", "steer"]
__getattr__ = renamed(__name__, {"Miss": "Unsteered"})
