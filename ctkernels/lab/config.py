"""Configurations of experiments: dataclasses that check their values, and from which command-line options are generated.

A field's type, such as ``Annotated[int, COUNT]``, defines the range of its values and the parser of its option; its
default value and its entry in the docstring are the option's default and help.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeVar

from ..cli.option_types import BETAS, COUNT, MARGIN, POSITIVE, SEED, SHARE, TEXT, Kind, names
from ..steering.activations import ACTIVATIONS
from .images.probe import check_probe

ACTIVATION_KINDS = names(list(ACTIVATIONS))
DEFAULT_BETAS = tuple(BETAS.read("0.7:1:0.01"))
T = TypeVar("T")


class Config:
    """The base of configurations.

    Raises:
        ValueError: a value is out of the range of its field.
    """

    def __post_init__(self) -> None:
        for name, (kind, optional, *_) in fields_of(type(self)).items():
            value = getattr(self, name)
            if value is None and optional:
                continue
            if isinstance(value, str):
                try:
                    value = kind(value)
                except argparse.ArgumentTypeError as error:
                    raise ValueError(f"{name} {error}") from None
            value = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else value
            kind.check(name, value)
            object.__setattr__(self, name, value)

    def arguments(self) -> dict[str, Any]:
        """The values of all fields, for result files."""
        values: dict[str, Any] = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


class Field(NamedTuple):
    """A field of a configuration, as the description of a command-line option."""

    kind: Kind[Any]
    optional: bool  # may be None
    default: Any
    text: str  # the entry in the docstring, without markup


_FIELDS: dict[type[Config], dict[str, Field]] = {}


def fields_of(config: type[Config]) -> dict[str, Field]:
    """The fields of a configuration that have a type of option, by name."""
    if config in _FIELDS:
        return _FIELDS[config]
    texts: dict[str, str] = {}
    for base in reversed(config.__mro__):
        _, _, arguments = inspect.cleandoc(base.__doc__ or "").partition("\nArgs:\n")
        entries = re.split(r"^    (?=\w[\w, ]*: )", arguments.partition("\n\n")[0], flags=re.MULTILINE)
        for entry in entries[1:]:
            names, _, text = " ".join(entry.split()).partition(": ")
            if not text.startswith("as of "):
                text = re.sub(r",? \(?see :\w+:`[^`]*`\)?", "", text)
                text = re.sub(r"(:\w+:)?`+~?\.?([^`]*)`+", r"\2", text).removesuffix(".")
                texts |= dict.fromkeys(names.split(", "), text)
    fields: dict[str, Field] = {}
    for name, hint in typing.get_type_hints(config, include_extras=True).items():
        for kind in getattr(hint, "__metadata__", ()):
            optional = type(None) in typing.get_args(hint.__origin__)
            fields[name] = Field(kind, optional, getattr(config, name), texts.get(name, ""))
    return _FIELDS.setdefault(config, fields)


def configured(kind: type[T], config: T | None, options: Mapping[str, Any]) -> T:
    """``config`` (None: the defaults of ``kind``) with some fields replaced by ``options``.

    Raises:
        TypeError: an option is no field of ``kind``.
    """
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    if unknown := [name for name in options if name not in known]:
        raise TypeError(f"options must be fields of {kind.__name__}, {known}, got {unknown}")
    return dataclasses.replace(config, **options) if config is not None else kind(**options)  # type: ignore[type-var]


@dataclass(frozen=True, kw_only=True)
class BetasConfig(Config):
    """Settings for steering: the activations, and the betas to try.

    Args:
        betas: START:STOP:STEP with both ends, or values, in [0, 1]; the plain network always takes part.
        activations: kinds to treat. Default: those of :func:`ctkernels.steer`.
    """

    betas: Annotated[Iterable[float] | str, BETAS] = "0.7:1:0.01"
    activations: Annotated[Sequence[str] | None, ACTIVATION_KINDS] = None

    @property
    def grid(self) -> tuple[float, ...]:
        """``betas``, ascending."""
        return tuple(sorted(set(map(float, self.betas))))

    @property
    def steering(self) -> dict[str, Any]:
        """Options of :func:`ctkernels.steer`."""
        return {} if self.activations is None else {"activations": self.activations}


@dataclass(frozen=True, kw_only=True)
class ChoiceConfig(BetasConfig):
    """Settings for choices by validation.

    Args:
        betas, activations: as of :class:`BetasConfig`.
        margin: standard errors by which another must be better in validation than the plain network, or the linear
            probe, to be chosen; 0: the best is, of equals the simplest. See :func:`ctkernels.lab.stats.preferred`.
    """

    margin: Annotated[float, MARGIN] = 1.0


@dataclass(frozen=True, kw_only=True)
class SteeringConfig(ChoiceConfig):
    """Settings for steering a frozen network and extracting its features.

    Args:
        betas, activations, margin: as of :class:`ChoiceConfig`.
        coeff: mixing coefficient c of the CT unit, in [0, 1].
        feature_layer: submodule whose output is used. Default: the input of the classifier, the last linear layer.
        l2: penalty of the logistic probe.
        seed: of splits, samples and probes.
        batch_size: images per forward pass.

    Raises:
        ValueError: a value is out of range.
        ImportError: scikit-learn is missing; the message names the extra.
    """

    coeff: Annotated[float | str, SHARE] = 0.5
    feature_layer: Annotated[str | None, TEXT] = None
    l2: Annotated[float, POSITIVE] = 0.01
    seed: Annotated[int, SEED] = 0
    batch_size: Annotated[int, COUNT] = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if (kind := self._probe()) is not None:
            check_probe(kind, self.l2)

    def _probe(self) -> str | None:
        """The kind of probe that is fitted; None: none."""
        return "logistic"

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "betas": list(self.grid)}
