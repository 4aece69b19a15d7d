"""Detects code that runs between a call of a module and its class's forward: hooks, and overrides on the instance."""

from __future__ import annotations

import torch
from torch import nn

_CALL = nn.Module.__call__


class FusedForward:
    """Base class of the forwards that :func:`fuse` puts on modules."""


def is_sharded(module: nn.Module) -> bool:
    """True if a call of ``module`` runs its class's forward between transformers' sharing out of tensors over ranks, which
    writes to none of them, and nothing else."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    forward = module.__dict__.get("forward")
    return not hooks and getattr(forward, "__module__", "") == "transformers.distributed.tensor_parallel"


def is_open(module: nn.Module) -> bool:
    """True if a call of ``module`` runs only its class's forward, or the one from :func:`fuse`."""
    if isinstance(module, torch.jit.ScriptModule) or type(module).__call__ is not _CALL:
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    attributes = module.__dict__
    forward = attributes.get("forward")
    return (
        (forward is None or isinstance(forward, FusedForward))
        and "_compiled_call_impl" not in attributes
        and "_call_impl" not in attributes
    )
