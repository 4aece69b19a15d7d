"""Look-up of devices that exist on this machine."""

from __future__ import annotations

import torch


def existing_device(name: str | torch.device) -> torch.device:
    """Returns the device of that name.

    Raises:
        ValueError: torch does not know it, it is not on this machine, or it is the meta device.
    """
    try:
        device = torch.empty(0, device=name).device
    except Exception as error:  # RuntimeError; AssertionError of a torch built without it; ImportError of an extension
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"device must be one that is here, got {str(name)!r}: {reason}") from error
    if device.type == "meta":
        raise ValueError(f"device must hold values, got {str(name)!r}")
    return device
