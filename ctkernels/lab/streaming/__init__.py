"""Continual learning: an adapter for each task that arrives, and a router that chooses among them."""

from .result import StreamResult
from .router import Router
from .run import stream

__all__ = ["Router", "StreamResult", "stream"]
