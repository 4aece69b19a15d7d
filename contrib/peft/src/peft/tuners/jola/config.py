# Copyright 2026-present the HuggingFace Inc. team.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Optional, Union

from peft.config import PeftConfig
from peft.utils import PeftType


@dataclass
class JolaConfig(PeftConfig):
    """
    This is the configuration class to store the configuration of a [`JolaModel`]. JoLA (Joint Localization and
    Activation Editing, https://huggingface.co/papers/2502.01179) edits the output z of every attention head to `(1 +
    g_m * m) * z + g_a * a`, where m and a are learned vectors and g_m and g_a are hard-concrete gates that can close
    for good.

    Args:
        target_modules (`Optional[Union[List[str], str]]`):
            The names of the attention output projections whose input is edited. If this is specified, only the modules
            with the specified names will be replaced. When passing a string, a regex match will be performed. When
            passing a list of strings, either an exact match will be performed or it is checked if the name of the
            module ends with any of the passed strings. If this is not specified, modules will be chosen according to
            the model architecture. If the architecture is not known, an error will be raised -- in this case, you
            should specify the target modules manually.
        exclude_modules (`Optional[Union[List[str], str]]`):
            The names of the modules to not apply the adapter to. When passing a string, a regex match will be
            performed. When passing a list of strings, either an exact match will be performed or it is checked if the
            name of the module ends with any of the passed strings.
        layers_to_transform (`Optional[Union[List[int], int]]`):
            The layer indices to transform. If a list of ints is passed, it will apply the adapter to the layer indices
            that are specified in this list. If a single integer is passed, it will apply the transformations on the
            layer at this index.
        layers_pattern (`Optional[Union[List[str], str]]`):
            The layer pattern name, used only if `layers_to_transform` is different from `None`.
        head_dim (`Optional[int]`):
            The size of an attention head. If this is not specified, it is read from the attention module or from the
            model's config. The whole input is one head if neither declares its heads.
        edit (`Literal["both", "multiplicative", "additive"]`):
            Whether to learn m and a, only m, or only a. An edit without a can be merged into projections without a
            bias and saved with them.
        init_log_alpha (`float`):
            The initial log alpha of every gate. With the default, all gates are open.
        temperature (`float`):
            The temperature of the hard-concrete distribution.
        stretch (`list[float]`):
            The interval to which the concrete distribution is stretched before it is clipped to [0, 1].
        gate_rate (`float`):
            The learning rate of log alpha relative to that of m and a. Log alpha is stored divided by it: with the
            learning rate of m and a, gates would hardly move.
        freeze_gates (`bool`):
            Whether to keep the gates as they are, deterministic and without training.
        init_weights (`bool`):
            Whether to initialize m and a such that the adapter is an identity transform. Don't change this setting,
            except if you know exactly what you're doing.
        modules_to_save (`Optional[List[str]]`):
            List of modules apart from JoLA layers to be set as trainable and saved in the final checkpoint.
    """

    target_modules: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={
            "help": (
                "List of module names or regex expression of the names of the attention output projections to edit. "
                "For example, ['o_proj'] or '.*decoder.*(SelfAttention|EncDecAttention).o$'. "
                "If not specified, modules will be chosen according to the model architecture. If the architecture is "
                "not known, an error will be raised -- in this case, you should specify the target modules manually."
            )
        },
    )
    exclude_modules: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={"help": "List of module names or regex expression of the module names to exclude from JoLA."},
    )
    layers_to_transform: Optional[Union[list[int], int]] = field(
        default=None,
        metadata={"help": "The layer index or indices to transform. If not specified, all layers are transformed."},
    )
    layers_pattern: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={"help": "The layer pattern name, used only if `layers_to_transform` is not None."},
    )
    head_dim: Optional[int] = field(
        default=None,
        metadata={"help": "The size of an attention head. If not specified, it is read from the model."},
    )
    edit: Literal["both", "multiplicative", "additive"] = field(
        default="both",
        metadata={"help": "Whether to scale and shift the outputs of heads, only to scale, or only to shift them."},
    )
    init_log_alpha: float = field(default=2.5, metadata={"help": "The initial log alpha of every gate."})
    temperature: float = field(default=0.33, metadata={"help": "Temperature of the hard-concrete distribution."})
    stretch: list[float] = field(
        default_factory=lambda: [-0.1, 1.1],
        metadata={"help": "Interval to which the concrete distribution is stretched before it is clipped to [0, 1]."},
    )
    gate_rate: float = field(
        default=10.0, metadata={"help": "Learning rate of log alpha relative to that of the edits."}
    )
    freeze_gates: bool = field(default=False, metadata={"help": "Whether to keep the gates as they are."})
    init_weights: bool = field(
        default=True,
        metadata={
            "help": (
                "Whether to initialize the edits such that the adapter is an identity transform. Don't change this "
                "setting, except if you know exactly what you're doing."
            )
        },
    )
    modules_to_save: Optional[list[str]] = field(
        default=None,
        metadata={
            "help": (
                "List of modules apart from JoLA layers to be set as trainable and saved in the final checkpoint. For "
                "example, in Sequence Classification or Token Classification tasks, the final layer "
                "`classifier/score` are randomly initialized and as such need to be trainable and saved."
            )
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.JOLA
        self.target_modules = (
            set(self.target_modules) if isinstance(self.target_modules, list) else self.target_modules
        )
        self.exclude_modules = (
            set(self.exclude_modules) if isinstance(self.exclude_modules, list) else self.exclude_modules
        )
        self.stretch = list(self.stretch)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        if self.edit not in ("both", "multiplicative", "additive"):
            raise ValueError(f"`edit` must be 'both', 'multiplicative' or 'additive', got {self.edit!r}.")
        if self.head_dim is not None and self.head_dim < 1:
            raise ValueError(f"`head_dim` must be at least 1, got {self.head_dim}.")
        if not self.temperature > 0:
            raise ValueError(f"`temperature` must be positive, got {self.temperature}.")
        if not self.gate_rate > 0:
            raise ValueError(f"`gate_rate` must be positive, got {self.gate_rate}.")
        if len(self.stretch) != 2 or not (self.stretch[0] < 0 and self.stretch[1] > 1):
            raise ValueError(f"`stretch` must be a number below 0 and one above 1, got {self.stretch}.")
