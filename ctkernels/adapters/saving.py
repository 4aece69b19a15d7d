"""Saving adapters so that an interruption leaves the old files whole."""

from __future__ import annotations

import os
from typing import Any

from ._files import replacing_folder


def save_adapter(model: Any, path: str | os.PathLike[str], **kwargs: Any) -> None:
    """Save the adapters of a `PeftModel` as `model.save_pretrained` does, but never half.

    `save_pretrained` writes in place, so an interruption there leaves a file cut short (which loading refuses). Here
    every file is written to a temporary folder and renamed at the end.

    Args:
        model: a `PeftModel`.
        path: folder to write to; other files in it stay.
        kwargs: passed to `save_pretrained`, for example `selected_adapters`; `safe_serialization` stays True.

    Raises:
        ValueError: path is a file, or pickled weights are asked for.

    Example:
        >>> save_adapter(model, "adapter")
        >>> PeftModel.from_pretrained(base, "adapter")
    """
    if not kwargs.get("safe_serialization", True):
        raise ValueError("safe_serialization must be True: pickled weights are not written")
    with replacing_folder(path) as folder:
        model.save_pretrained(str(folder), **kwargs)
