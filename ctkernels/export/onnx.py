"""Models as ONNX files."""

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

LEAST_OPSET = 18  # of the exporter in torch
_ONE_FILE = 1 << 30  # bytes of weights; protobuf takes no file above two gigabytes


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
    """Save ``model`` for inference as an ONNX file of standard operations, for any runtime.

    What is exported is :func:`portable`'s program: units, head edits and gates are a few operations each, with their knobs
    as constants, BatchNorms are folded into convolutions, and nothing overflows. Finite inputs give the model's outputs
    within the rounding of the runtime.

    Args:
        model: a module in evaluation mode, or an exported program; left as it is.
        args: example inputs; None beside a program.
        path: file to write; replaced only when the new one is complete. Weights of more than a gigabyte go into a second
            file beside it, with ".data" at its end.
        kwargs: example inputs by name.
        dynamic_shapes: as for :func:`portable`. Default: dimension 0 of every input may change. None: all shapes are fixed.
        input_names, output_names: names in the file. Default: those of the forward's arguments, and "output".
        opset_version: of ONNX, at least 18. Default: 18.

    Returns:
        The path.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        TypeError, ValueError: as :func:`portable`; the opset is too old.

    Examples:
        >>> import ctkernels.export
        >>> handle = ctkernels.steer(model, beta=0.9)
        >>> path = ctkernels.export.onnx(model, (x,), "model.onnx")
    """
    if isinstance(opset_version, bool) or not isinstance(opset_version, int) or opset_version < LEAST_OPSET:
        raise ValueError(f"opset_version: expected an integer of at least {LEAST_OPSET}, got {opset_version!r}")
    for package in ("onnx", "onnxscript"):
        require(package, "onnx", "export to ONNX")
    given = None if isinstance(model, ExportedProgram) else dynamic_shapes
    program = portable(model, args, kwargs, dynamic_shapes=given)
    converted = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=opset_version,
        input_names=input_names,
        output_names=output_names,
        verbose=False,
    )
    assert converted is not None
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    held = (*program.state_dict.values(), *program.constants.values())
    size = sum(t.numel() * t.element_size() for t in held if isinstance(t, torch.Tensor))
    with temporary_folder(target.parent) as folder:
        converted.save(folder / target.name, external_data=size > _ONE_FILE)
        for file in sorted(folder.iterdir(), key=lambda file: file.name == target.name):  # the graph after its weights
            os.replace(file, target.parent / file.name)
    return target
