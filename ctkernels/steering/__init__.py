"""Steering: every activation of a model becomes a CT unit, in place and reversibly.

``activations`` lists what can be steered. ``scan`` finds the sites of a model, in its modules and, with ``names``, ``source`` and
``rewrite``, in its source code. ``patch`` changes modules and changes them back, ``runtime`` is what then runs, and ``handle``
holds ``steer`` and what the user gets from it.
"""

from .._renamed import renamed
from .handle import Steering, handle_of, steer
from .scan import Site, Unsteered

__all__ = ["Site", "Steering", "Unsteered", "handle_of", "steer"]
__getattr__ = renamed(__name__, {"Miss": "Unsteered"})
