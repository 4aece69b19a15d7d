"""A live page of the edits of a model in this process, by layer and head.

Importing this package needs peft.
"""

from .server import LiveServer, watch

__all__ = ["LiveServer", "watch"]
