"""Configurations of experiments: dataclasses that are checked when they are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from .images.backbone import MEAN_FREE
from .images.probe import check_probe

DEFAULT_BETAS = tuple(round(0.70 + 0.01 * i, 2) for i in range(31))
T = TypeVar("T")


def configured(kind: type[T], config: T | None, options: Mapping[str, Any]) -> T:
    """``config``, or ``kind``'s defaults, with the fields in ``options`` instead of its own.

    Raises:
        TypeError: an option that ``kind`` does not have.
    """
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    if unknown := [name for name in options if name not in known]:
        raise TypeError(f"options must be fields of {kind.__name__}, {known}, got {unknown}")
    return dataclasses.replace(config, **options) if config is not None else kind(**options)  # type: ignore[type-var]


def check_betas(betas: Iterable[float] | None) -> tuple[float, ...]:
    """Different values of beta, ascending; the default ones for None. ValueError for none, or one out of range."""
    grid = sorted({float(b) for b in (DEFAULT_BETAS if betas is None else betas)})
    if not grid:
        raise ValueError("betas must hold at least one value, got none")
    if bad := [b for b in grid if not 0 <= b <= 1]:
        raise ValueError(f"betas must be in [0, 1], got {bad}")
    return tuple(grid)


def check_least(config: Any, **least: int) -> None:
    """ValueError for a field that is less than it may be; None passes."""
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and value < bound:
            raise ValueError(f"{name} must be at least {bound}, got {value}")


@dataclass(frozen=True, kw_only=True)
class SteeringConfig:
    """Settings for steering a frozen network and reading its features.

    Args:
        betas: in [0, 1]; the plain network always takes part. Default 0.70 to 1.00 in steps of 0.01.
        coeff: the mixing coefficient c of the CT unit, in [0, 1].
        activations: which kinds to steer; default :func:`ctkernels.steer`'s.
        feature_layer: name of a submodule whose output is used. Default: what enters the classifier, the last linear
            layer.
        l2: penalty of the logistic probe.
        seed: of everything random: splits, samples, probes.
        batch_size: images per forward pass.

    Raises:
        ValueError: a value out of range.
        ImportError: scikit-learn is missing; the message names the extra.
    """

    betas: Iterable[float] | None = None
    coeff: float | str = 0.5
    activations: Iterable[str] | None = None
    feature_layer: str | None = None
    l2: float = 0.01
    seed: int = 0
    batch_size: int = 32

    DEFAULT_BETAS: ClassVar[tuple[float, ...]] = DEFAULT_BETAS
    MAY_BE_MEAN_FREE: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", check_betas(self.DEFAULT_BETAS if self.betas is None else self.betas))
        if self.activations is not None:
            object.__setattr__(self, "activations", tuple(self.activations))
        mean_free = self.MAY_BE_MEAN_FREE and self.coeff == MEAN_FREE
        if not mean_free and (isinstance(self.coeff, str) or not 0 <= self.coeff <= 1):
            other = f"; or be {MEAN_FREE!r}" if self.MAY_BE_MEAN_FREE else ""
            raise ValueError(f"coeff must be in [0, 1], got {self.coeff!r}{other}")
        check_least(self, batch_size=1)
        if (kind := self._probe()) is not None:
            check_probe(kind, self.l2)

    def _probe(self) -> str | None:
        """The kind of probe that reads the features; None for none."""
        return "logistic"

    @property
    def grid(self) -> tuple[float, ...]:
        """``betas``, ascending."""
        return tuple(self.betas or ())

    @property
    def steering(self) -> dict[str, Any]:
        """Options of :func:`ctkernels.steer`."""
        return {} if self.activations is None else {"activations": self.activations}

    def arguments(self) -> dict[str, Any]:
        """The values of all fields, for the result file."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}
