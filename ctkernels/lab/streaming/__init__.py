"""Tasks that arrive one after the other: an adapter for each, none forgotten, and a router that chooses between them."""

from .result import StreamResult
from .router import Router
from .run import stream

__all__ = ["Router", "StreamResult", "stream"]
