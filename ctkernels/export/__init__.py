"""Models outside of this library: as programs of torch's operations only, and as ONNX."""

from .onnx import onnx
from .portable import portable

__all__ = ["onnx", "portable"]
