"""The configuration of a trainable Curvature Tuning adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...steering.activations import ACTIVATIONS, select
from .._config import AdapterConfig
from .._peft import method_key

GRANULARITIES = ("channel", "layer", "shared")
SHARING = ("module", "site")
# Initial beta and coeff of the ReLU family. From the paper's beta of 0.8, training falls to chance in deep networks whose other
# weights and statistics are frozen: at 0.8 their features are no longer the pretrained ones (docs/compare.md).
RELU_START = (0.95, 0.5)
SMOOTH_COEFF = 1 / (1 + math.exp(-10))  # initial coeff of SiLU and GELU: the logit of 1 is infinite


@dataclass
class CurvatureConfig(AdapterConfig):
    """Configuration of trainable Curvature Tuning (T-CT): every activation becomes a CT unit with a learned beta, coeff.

    A site is a place where the model applies an activation: a module, or a call in its code (`F.relu`, `x.relu()`),
    found as by `ctkernels.steer`. The channels of each site are found by calling a copy of the model on fake tensors
    (shapes without data), which affects neither BatchNorm statistics nor random states.

    Args:
        granularity: one (beta, coeff) per channel ("channel", as in the paper), per site ("layer"), or for the whole model
            ("shared"; one for each neutral point if these differ).
        share: "module": the uses of one activation module (the ReLU of a ResNet's basic block, called twice) share
            their parameters, if they have the same channels. "site": each use has its own. Default: "module".
            Both give the published parameter counts of ResNets: a bottleneck's uses differ in channels.
        activations: "all", or some of "relu", "leaky_relu", "prelu", "relu6", "silu", "gelu" (exact), "gelu_tanh"
            (tanh approximation), "quick_gelu".
        target_modules: the sites to adapt: None (all), a regular expression that matches whole site names, or a list of
            names or name endings. `find_activations` lists them.
        exclude_modules: sites to leave alone, likewise.
        init_beta: initial beta, strictly between 0 and 1. None: 0.95 for the ReLU family (the paper: 0.8), and the neutral
            point for SiLU and GELU (0.5; 0.63 for quick GELU).
        init_coeff: initial coeff, likewise. None: the paper's 0.5 for the ReLU family, 0.99995 for others.
        input_shape: shape of one input, without the batch dimension, for the copy of the model; None tries what the
            model or its config declares and the usual image sizes.
        layout: {site name: [dimension of the channels, their number]}, or None instead of the pair for one (beta, coeff)
            for the whole site. None finds it; saved configurations have it. If given, exactly its sites are adapted, without
            a search: for models that cannot be called with one tensor.
        modules_to_save: other modules to train and save with the adapter, such as a new head.

    Raises:
        ValueError: a value outside its range; the message names the field.

    Examples:
        >>> model = get_peft_model(resnet18(), CurvatureConfig(modules_to_save=["fc"]))
        >>> optimizer = torch.optim.Adam(parameter_groups(model))  # 0.1 for beta and coeff, 1e-3 for the head

    Source: Curvature Tuning paper, sections 3.3 and 4.1.
    """

    method: ClassVar[str] = "CURVATURE"

    granularity: str = field(default="channel")
    share: str = field(default="module")
    activations: list[str] | str = field(default="all")
    target_modules: list[str] | set[str] | str | None = field(default=None)
    exclude_modules: list[str] | set[str] | str | None = field(default=None)
    init_beta: float | None = field(default=None)
    init_coeff: float | None = field(default=None)
    input_shape: list[int] | tuple[int, ...] | None = field(default=None)
    layout: dict[str, Any] | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = method_key(self.method)
        for name, allowed in (("granularity", GRANULARITIES), ("share", SHARING)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"CurvatureConfig: {name} must be one of {allowed}, got {getattr(self, name)!r}")
        try:
            select(self.activations)
        except ValueError as error:
            raise ValueError(f"CurvatureConfig: {error}") from None
        for name in ("init_beta", "init_coeff"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not 0 < value < 1):
                raise ValueError(
                    f"CurvatureConfig: {name} must lie strictly between 0 and 1 (its logit is learned), got {value!r}"
                )
        shape = self.input_shape
        if shape is not None and (not shape or not all(type(size) is int and size > 0 for size in shape)):
            raise ValueError(f"CurvatureConfig: input_shape must be positive sizes without the batch, got {shape!r}")
        for site, entry in (self.layout or {}).items():
            pair = entry is None or (
                isinstance(entry, (list, tuple)) and len(entry) == 2 and all(type(n) is int for n in entry)
            )
            if not pair or (entry is not None and entry[1] < 1):
                raise ValueError(
                    f"CurvatureConfig: layout must map sites to [dimension, number of channels], got {entry!r} for {site}"
                )
        if self.layout is not None and not self.layout:
            raise ValueError("CurvatureConfig: layout must name at least one site, got none")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)

    def start(self, activation: str) -> tuple[float, float]:
        """Initial beta and coeff of a site with this activation."""
        neutral = ACTIVATIONS[activation]
        beta, coeff = RELU_START if neutral.beta == 1.0 else (neutral.beta, SMOOTH_COEFF)
        return (
            beta if self.init_beta is None else self.init_beta,
            coeff if self.init_coeff is None else self.init_coeff,
        )
