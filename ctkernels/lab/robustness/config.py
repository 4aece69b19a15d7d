"""The configuration of a robustness evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from ..._extras import require
from ...cli.option_types import BETAS, COUNT, LEVELS, Kind, choice, names
from ..config import SteeringConfig
from .attacks import ATTACKS_OR_STANDARD, AttackConfig, Threat
from .corruptions import CORRUPTIONS

LINF, L2 = Threat("linf", 8 / 255), Threat("l2", 0.5)
_SOME = names(CORRUPTIONS)
CORRUPTIONS_OR_ALL: Kind[Sequence[str]] = Kind(
    f"{_SOME.expected}, or all, or none",
    lambda text: CORRUPTIONS if text == "all" else () if text == "none" else _SOME.read(text),
    _SOME.fits,
)


@dataclass(frozen=True, kw_only=True)
class RobustnessConfig(SteeringConfig, AttackConfig):
    """The configuration of :func:`robustness`.

    Args:
        betas, activations, margin, coeff, feature_layer, l2, seed, batch_size: as of :class:`SteeringConfig`.
        iterations, queries: as of :class:`AttackConfig`.
        head: ``"probe"``: a linear probe is fitted on frozen features of the training images for every beta, as in S-CT.
            ``"own"``: the network's own output classifies; its classes are the labels.
        mean, std: of each channel, for normalisation inside the network. Default: those of the preprocessing of an
            :class:`ImageSet`, no normalisation for tensors.
        threats: norms and bounds, in pixels: by default 8/255 in the maximum norm, 0.5 in the Euclidean. May be empty.
        corruptions: names with commas, all, or none.
        severities: of the corruptions, 1 to 5; empty: no corruptions.
        attacks: for the test, names with commas. Default: AutoAttack's standard ensemble, see :func:`attack`.
        val_attacks: for the choice of beta: by default APGD on the cross-entropy, a tenth of the cost of the standard
            ensemble.
        max_attacked: maximal number of validation, and of test, images to attack, a stratified sample.

    Raises:
        ValueError: a value is out of range, threats are equal, or there is nothing to test.
        ImportError: pyautoattack, imagecorruptions-imaug or scikit-learn is missing; the message names the extra.
    """

    betas: Annotated[Iterable[float] | str, BETAS] = "0.5:1:0.05"
    head: Annotated[str, choice("probe", "own")] = "probe"
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    threats: Sequence[Threat] = (LINF, L2)
    corruptions: Annotated[Sequence[str] | str, CORRUPTIONS_OR_ALL] = "all"
    severities: Annotated[Sequence[int], LEVELS] = (1, 2, 3, 4, 5)
    val_attacks: Annotated[Sequence[str] | str | None, ATTACKS_OR_STANDARD] = "apgd-ce"
    max_attacked: Annotated[int | None, COUNT] = 1000
    batch_size: Annotated[int, COUNT] = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.threats and not self.corrupts:
            raise ValueError("threats or corruptions must hold something to test, both are empty")
        if len({str(t) for t in self.threats}) < len(self.threats):
            raise ValueError(f"threats must differ, got {[str(t) for t in self.threats]}")
        if self.threats:
            require("pyautoattack", "lab", "adversarial attacks")
        if self.corrupts:
            require("imagecorruptions", "lab", "common corruptions")

    def _probe(self) -> str | None:
        return "logistic" if self.head == "probe" else None

    @property
    def corrupts(self) -> bool:
        """Whether there are corruptions to test."""
        return bool(self.corruptions and self.severities)

    def arguments(self) -> dict[str, Any]:
        in_conditions = ("threats", "corruptions", "severities")
        return {name: value for name, value in super().arguments().items() if name not in in_conditions}
