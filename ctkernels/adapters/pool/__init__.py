"""Many adapters of one frozen model in memory, served side by side: docs/pool.md."""

from .pool import AdapterPool
from .slots import PoolFullError

__all__ = ["AdapterPool", "PoolFullError"]
