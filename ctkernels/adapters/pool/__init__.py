"""Serves many adapters of one frozen model from memory: docs/pool.md."""

from .pool import AdapterPool
from .slots import PoolFullError

__all__ = ["AdapterPool", "PoolFullError"]
