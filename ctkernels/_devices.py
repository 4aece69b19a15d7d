"""Devices by name: those that are here and can hold values."""

from __future__ import annotations

import torch


def existing_device(name: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: torch does not know it, it is not on this machine, or its tensors hold no values.
    """
    try:
        found = torch.empty(0, device=name).device
    except Exception as error:  # RuntimeError; AssertionError of a torch built without it; ImportError of an extension
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"device must be one that is here, got {str(name)!r}: {reason}") from error
    if found.type == "meta":
        raise ValueError(f"device must hold values, got {str(name)!r}")
    return found
