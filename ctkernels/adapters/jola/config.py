"""The configuration of a JoLA adapter."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .._config import AdapterConfig
from .._peft import method_key

_EDITS = ("both", "multiplicative", "additive")
_ESTIMATORS = ("clip", "mean")
_SAMPLING = ("forward", "row")
_ADDITIVE = ("head", "kv_group")
_SITES = ("head", "mlp", "block")
_GATE_RATE = 10.0


@dataclass
class JolaConfig(AdapterConfig):
    """Configuration of JoLA: every attention head's output z becomes `(1 + g_m*m) * z + g_a*a` (JoLA, eq. 2).

    m and a are vectors per head, g_m and g_a hard-concrete gates per head that the penalty can close for good. With
    another `site`, z is the output of an MLP or of a whole block, by default as one head: without gates
    (`freeze_gates`) this is RED, with `edit="multiplicative"` learned scales as in (IA)3, with `edit="additive"` learned
    biases as in BitFit.

    Args:
        site: the activation to edit: "head" (default), the heads in the input of an attention's output projection; "mlp",
            the output of an MLP's last projection, before dropout and the residual addition; "block", the output of a
            block, including the residual. Edits of heads and MLPs can be merged into the projection, edits of blocks
            cannot.
        target_modules: the modules to edit (attention output projections, last projections of MLPs, or blocks): None
            (heads by the table of model families, or by a search in an unknown model; MLPs and blocks by structure), a
            regular expression matched against whole module names, or a list of names or name suffixes.
        exclude_modules: names, or a regular expression, of modules to leave out.
        layers_to_transform: layer index or indices to edit; None edits all. The index is the first number in the
            module's name.
        layers_pattern: name, or names, of the layer list that `layers_to_transform` indexes, for models with
            more than one (for example "decoder.layers").
        heads: the heads to edit: None (all), a list (the same in every layer), or a dict from layer index or
            module name to a list, or to `{"m": list, "a": list}` for separate lists. Layers missing from the
            dict are not edited.
        head_dim: size of a head; None reads it from the model. With another `site`, the features are split into heads of
            this size, each with gates of its own; None: one head.
        edit: "both", "multiplicative" (m only) or "additive" (a only).
        additive: "head", an offset a for each head (default); or "kv_group", one for all heads that share keys and
            values, added before scaling: `(1 + g_m*m) * (z + g_a*a)`. A "kv_group" edit equals a bias of the value
            projection, which more runtimes support (`save_merged`); so does "head" without grouped-query attention.
        init_std: standard deviation of the initial m and a; 0 starts at the identity exactly. Default 1e-3.
        init_log_alpha: initial log alpha of every gate. Default 2.5: all gates open, `P(g != 0) = 0.964`.
        temperature: temperature of the hard-concrete distribution. Default 0.33.
        stretch: its stretch interval, below 0 and above 1. Default (-0.1, 1.1).
        gate_estimator: the deterministic gate used in eval and for merging: "clip" (default: the clipped stretched
            sigmoid, exact zeros) or "mean" (the expectation E[g]).
        gate_sampling: in training, one gate sample per forward ("forward", the default and the paper's) or one per row
            of the batch ("row", the first dimension of the projection's input).
        gate_rate: learning-rate multiplier of log alpha relative to m and a; log alpha is stored divided by it. Without
            it, a learning rate that suits m and a is too low to close gates. Default 10; 1 in configurations saved before
            this field existed, whose files hold log alpha itself.
        freeze_gates: use deterministic gates in training too, and do not train log alpha.
        modules_to_save: other modules to train and save with the adapter.

    Raises:
        ValueError: a value is outside its range; the message names the field.

    Source: JoLA, arXiv 2502.01179.

    Examples:
        >>> config = JolaConfig(task_type="CAUSAL_LM", layers_to_transform=[0, 1])
        >>> model = get_peft_model(base, config)
    """

    method: ClassVar[str] = "JOLA"

    site: str = field(default="head")
    target_modules: list[str] | set[str] | str | None = field(default=None)
    exclude_modules: list[str] | set[str] | str | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    heads: Any = field(default=None)
    head_dim: int | None = field(default=None)
    edit: str = field(default="both")
    additive: str = field(default="head")
    init_std: float = field(default=1e-3)
    init_log_alpha: float = field(default=2.5)
    temperature: float = field(default=0.33)
    stretch: tuple[float, float] = field(default=(-0.1, 1.1))
    gate_estimator: str = field(default="clip")
    gate_sampling: str = field(default="forward")
    gate_rate: float = field(default=None)  # type: ignore[assignment]
    freeze_gates: bool = field(default=False)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate_rate is None:
            self.gate_rate = _GATE_RATE if self.peft_type is None else 1.0  # only files set peft_type
        self.peft_type = method_key(self.method)
        for name, allowed in (
            ("site", _SITES),
            ("edit", _EDITS),
            ("additive", _ADDITIVE),
            ("gate_estimator", _ESTIMATORS),
            ("gate_sampling", _SAMPLING),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"JolaConfig: {name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.site != "head" and self.additive != "head":
            raise ValueError(
                f"JolaConfig: additive must be 'head' with site={self.site!r}, where no heads share values, got "
                f"{self.additive!r}"
            )
        if not self.temperature > 0:
            raise ValueError(f"JolaConfig: temperature must be positive, got {self.temperature!r}")
        if not 0 < self.gate_rate < math.inf:
            raise ValueError(f"JolaConfig: gate_rate must be positive and finite, got {self.gate_rate!r}")
        if not self.init_std >= 0:
            raise ValueError(f"JolaConfig: init_std must be at least 0, got {self.init_std!r}")
        if len(self.stretch) != 2 or not (self.stretch[0] < 0 and self.stretch[1] > 1):
            raise ValueError(f"JolaConfig: stretch must be (below 0, above 1), got {self.stretch!r}")
        if self.head_dim is not None and self.head_dim < 1:
            raise ValueError(f"JolaConfig: head_dim must be at least 1, got {self.head_dim!r}")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("JolaConfig: layers_pattern needs layers_to_transform, got None")
        self.stretch = (float(self.stretch[0]), float(self.stretch[1]))
        if isinstance(self.heads, dict):
            self.heads = {str(key): value for key, value in self.heads.items()}
        values = list(self.heads.values()) if isinstance(self.heads, dict) else [self.heads]
        for value in values:
            parts = list(value.values()) if isinstance(value, dict) and set(value) <= {"m", "a"} else [value]
            for part in parts:
                if part is not None and not (isinstance(part, list) and all(type(head) is int for head in part)):
                    raise ValueError(
                        "JolaConfig: heads must be None, a list of indices, or a dict from layer or module to a list "
                        f"or {{'m': list, 'a': list}}, got {self.heads!r}"
                    )
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)

    def layer_index(self, name: str) -> int | None:
        """The layer number in a module name, or None if it has none (or none under `layers_pattern`)."""
        if not self.layers_pattern:
            match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
            return int(match.group(1)) if match else None
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        for pattern in patterns:
            match = re.search(rf"(?:^|\.){pattern}\.(\d+)(?:\.|$)", name)
            if match:
                return int(match.group(1))
        return None

    def selects_layer(self, name: str) -> bool:
        """Whether the module `name` is in a selected layer."""
        if self.layers_to_transform is not None:
            wanted = self.layers_to_transform
            if self.layer_index(name) not in ([wanted] if isinstance(wanted, int) else wanted):
                return False
        return not isinstance(self.heads, dict) or self._entry(name) is not None

    def unused(self, names: list[str]) -> list[Any]:
        """The layers and modules in `layers_to_transform` and `heads` that match none of the module names."""
        layers = {self.layer_index(name) for name in names}
        wanted = [self.layers_to_transform] if isinstance(self.layers_to_transform, int) else self.layers_to_transform
        missing: list[Any] = [layer for layer in wanted or [] if layer not in layers]
        if isinstance(self.heads, dict):
            known = {*names, *map(str, layers)}
            missing += [key for key in self.heads if key not in known]
        return missing

    def _entry(self, name: str) -> Any:
        if name in self.heads:
            return self.heads[name]
        return self.heads.get(str(self.layer_index(name)))

    def shared(self, kind: str, num_heads: int, num_kv_heads: int | None) -> int:
        """The number of consecutive heads that share one vector and gate of `kind`, "m" or "a"."""
        return num_heads // num_kv_heads if kind == "a" and self.additive == "kv_group" and num_kv_heads else 1

    def heads_of(
        self, name: str, num_heads: int, num_kv_heads: int | None
    ) -> tuple[list[int] | None, list[int] | None]:
        """The heads with a multiplicative and with an additive edit in module `name`; None means all.

        Raises:
            ValueError: a head is listed twice or is outside `0 .. num_heads - 1`; with additive="kv_group", the groups
                are unknown or only a part of one is listed.
        """
        entry = self._entry(name) if isinstance(self.heads, dict) else self.heads
        parts = [entry.get("m", []), entry.get("a", [])] if isinstance(entry, dict) else [entry, entry]
        for position, kind in enumerate(("multiplicative", "additive")):
            if self.edit not in ("both", kind):
                parts[position] = []
        for part in parts:
            if part is not None and (len(set(part)) != len(part) or not all(0 <= head < num_heads for head in part)):
                raise ValueError(f"{name}: heads must be distinct and in 0..{num_heads - 1}, got {part}")
        multiplicative, additive = (None if part is None else sorted(part) for part in parts)
        if self.additive == "kv_group" and additive != []:
            if num_kv_heads is None:
                raise ValueError(
                    f"{name}: additive='kv_group' needs to know which heads share values, and no projection of values was "
                    "found beside this one; use additive='head'"
                )
            group = num_heads // num_kv_heads
            counts = Counter(head // group for head in additive or ())
            if any(count != group for count in counts.values()):
                raise ValueError(
                    f"{name}: with additive='kv_group', heads must be whole groups of {group} that share values, "
                    f"got {additive}"
                )
        return multiplicative, additive
