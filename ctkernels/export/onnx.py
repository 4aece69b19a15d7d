"""Export to ONNX files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from .._extras import require
from .._files import temporary_folder
from .portable import portable

LEAST_OPSET = 18  # of torch's exporter
_ONE_FILE = 1 << 30  # bytes of weights; protobuf is limited to files of two gigabytes


def onnx(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...] | None,
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = "batch",
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset_version: int = LEAST_OPSET,
) -> Path:
    """Saves ``model`` for inference as an ONNX file of standard operations, for any runtime.

    Exports the program of :func:`portable`: units, head edits and gates are a few operations each, with constant knobs, and
    BatchNorms are folded into convolutions. Finite inputs give the model's outputs within the rounding of the runtime.

    Args:
        model: a module in evaluation mode, or an exported program; not modified.
        args: example inputs; None for a program.
        path: file to write; replaced only when the new one is complete. Weights of more than a gigabyte go to a second file
            next to it, with the suffix ".data".
        kwargs: example inputs by name.
        dynamic_shapes: as for :func:`portable`. Default: dimension 0 of every input is dynamic. None: all shapes are fixed.
        input_names, output_names: names in the file. Default: those of the forward's arguments, and "output".
        opset_version: of ONNX, at least 18. Default: 18.

    Returns:
        The path.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        TypeError, ValueError: as :func:`portable`; or the opset is too old.

    Examples:
        >>> import ctkernels.export
        >>> handle = ctkernels.steer(model, beta=0.9)
        >>> path = ctkernels.export.onnx(model, (x,), "model.onnx")
    """
    if isinstance(opset_version, bool) or not isinstance(opset_version, int) or opset_version < LEAST_OPSET:
        raise ValueError(f"opset_version: expected an integer of at least {LEAST_OPSET}, got {opset_version!r}")
    for package in ("onnx", "onnxscript"):
        require(package, "onnx", "export to ONNX")
    shapes = None if isinstance(model, ExportedProgram) else dynamic_shapes
    program = portable(model, args, kwargs, dynamic_shapes=shapes)
    names: dict[str, Any] = {"input_names": input_names, "output_names": output_names}
    converted = torch.onnx.export(program, dynamo=True, opset_version=opset_version, verbose=False, **names)
    assert converted is not None
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    tensors = (*program.state_dict.values(), *program.constants.values())
    size = sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
    with temporary_folder(target.parent) as folder:
        converted.save(folder / target.name, external_data=size > _ONE_FILE)
        for file in sorted(folder.iterdir(), key=lambda file: file.name == target.name):  # weights before the graph
            os.replace(file, target.parent / file.name)
    return target
