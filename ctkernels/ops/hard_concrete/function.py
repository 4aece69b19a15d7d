"""``ctkernels.functional.hard_concrete`` and ``expected_l0``: argument checks, and the call of the op."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import backends, checks
from ..layout import NO_CHANNEL
from .op import OP, HardConcreteAttrs
from .reference import CLIP, MAX_MEAN_TEMPERATURE, MEAN, OPEN, SAMPLE, uniform


def hard_concrete(
    log_alpha: Tensor,
    *,
    training: bool,
    temperature: float = 0.33,
    stretch: tuple[float, float] = (-0.1, 1.1),
    estimator: str = "clip",
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Gates in [0, 1], with exact zeros and ones, from their logits; any number of gates in one call.

    In training, samples g = clip(s * (high - low) + low, 0, 1) with s = sigmoid((log u - log(1 - u) + log_alpha) / temperature)
    and uniform u; otherwise deterministic.

    Args:
        log_alpha: logits of any shape; float32 or wider is kept, narrower is widened.
        training: whether to sample.
        temperature: of the concrete distribution; at most 10 for ``estimator="mean"``.
        stretch: (low, high) with low < 0 and high > 1: the interval that the distribution is stretched to before clipping.
        estimator: the deterministic gate: ``"clip"``, clip(sigmoid(log_alpha) * (high - low) + low), as in the L0 paper and the
            JoLA code; or ``"mean"``, the expectation E[g], as in the JoLA paper, within 1e-12.
        noise: uniform numbers in (0, 1) of ``log_alpha``'s shape to sample from; or an int64 seed of shape (1,), from which
            Philox, a counter-based generator, makes them, the same on every device. None draws them.
        generator: for the noise, or on a GPU for a seed; None is torch's default generator of the device.

    Returns:
        Gates of ``log_alpha``'s shape, differentiable in it.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape, device or range.

    Examples:
        >>> log_alpha = torch.tensor([-4.0, 0.0, 4.0])
        >>> gates = ctkernels.functional.hard_concrete(log_alpha, training=True)
        >>> ctkernels.functional.hard_concrete(log_alpha, training=False)
        tensor([0.0000, 0.5000, 1.0000])

    Source: Louizos, Welling and Kingma 2018, equations 10 to 13; JoLA, ICML 2025, section 3.2.
    """
    checks.tensor("hard_concrete", "log_alpha", log_alpha)
    checks.choice("hard_concrete", "estimator", estimator, ("clip", "mean"))
    low, high = _stretch("hard_concrete", temperature, stretch)
    logits = checks.widened(log_alpha)
    mode = SAMPLE if training else CLIP if estimator == "clip" else MEAN
    if mode == MEAN and temperature > MAX_MEAN_TEMPERATURE:
        raise ValueError(
            f"hard_concrete: temperature must be at most {MAX_MEAN_TEMPERATURE:g} for estimator='mean', whose quadrature needs "
            f"more points at higher temperatures; got {temperature}"
        )
    noise = _noise(logits, noise, generator) if training else None
    backends.check_forced_backend(logits)
    return OP((logits.contiguous(), noise), HardConcreteAttrs(NO_CHANNEL, mode, float(temperature), low, high))


def _noise(logits: Tensor, noise: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """Noise as the op takes it. On a GPU, a seed drawn on the device by torch's generator: nothing synchronises, and every
    replay of a CUDA graph draws a new one."""
    on_device = logits.is_cuda and not torch._C._are_functorch_transforms_active()
    if noise is None:
        if on_device:
            return torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator, device=logits.device)
        return torch.rand(logits.shape, generator=generator, dtype=logits.dtype, device=logits.device)
    if isinstance(noise, Tensor) and noise.dtype == torch.int64:
        if noise.shape != (1,):
            raise ValueError(f"hard_concrete: noise as an int64 seed must have shape (1,), got {tuple(noise.shape)}")
        checks.same_device("hard_concrete", "noise", noise, "log_alpha", logits)
        return noise if on_device else uniform(noise, logits.shape, logits.dtype)
    checks.tensor("hard_concrete", "noise", noise)
    checks.same_shape("hard_concrete", "noise", noise, "log_alpha", logits)
    return noise.to(logits.dtype).contiguous()


def expected_l0(log_alpha: Tensor, *, temperature: float = 0.33, stretch: tuple[float, float] = (-0.1, 1.1)) -> Tensor:
    r"""P(g != 0) of hard-concrete gates, sigmoid(log_alpha - temperature * log(-low / high)): the L0 penalty per gate.

    Args:
        log_alpha: logits of any shape; float32 or wider is kept, narrower is widened.
        temperature: temperature of the distribution. Default 0.33.
        stretch: its stretch interval (low, high). Default (-0.1, 1.1).

    Returns:
        A tensor of ``log_alpha``'s shape, differentiable with respect to it.

    Raises:
        TypeError, ValueError: as :func:`hard_concrete`.

    Examples:
        >>> log_alpha = torch.full((4,), 2.5, requires_grad=True)
        >>> ctkernels.functional.expected_l0(log_alpha).sum().backward()

    Source: Louizos, Welling and Kingma 2018, equation 12; JoLA, ICML 2025, equation 4.
    """
    checks.tensor("expected_l0", "log_alpha", log_alpha)
    low, high = _stretch("expected_l0", temperature, stretch)
    logits = checks.widened(log_alpha)
    return OP((logits.contiguous(), None), HardConcreteAttrs(NO_CHANNEL, OPEN, float(temperature), low, high))


def _stretch(op: str, temperature: float, stretch: tuple[float, float]) -> tuple[float, float]:
    if not checks.finite(op, "temperature", temperature) > 0:
        raise ValueError(f"{op}: temperature must be positive, got {temperature}")
    if not isinstance(stretch, (tuple, list)) or len(stretch) != 2:
        raise TypeError(f"{op}: stretch must be a pair (low, high), got {stretch!r}")
    low, high = (checks.finite(op, "stretch", v) for v in stretch)
    if not (low < 0 and high > 1 and high - low < math.inf):
        raise ValueError(
            f"{op}: stretch must be (low, high) with low < 0 and high > 1, not too far apart, got {stretch}"
        )
    return low, high
