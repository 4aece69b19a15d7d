"""Export of models for use without this library: as programs of torch's operations, and as ONNX."""

from .onnx import onnx
from .portable import portable

__all__ = ["onnx", "portable"]
