"""Verifies that a saved model computes the adapted one's outputs, on random inputs, within a measured rounding error."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..jola.layer import JolaLayer
from ..jola.model import jola_layers
from ..jola.packing import packing
from ..jola.runtimes import RUNTIMES
from ..jola.sites import linear_shape, unwrapped

_ROWS, _TOKENS = 2, 12


class Expected(NamedTuple):
    """The expected output of a saved model.

    Attributes:
        inputs: of one forward.
        output: of the model with its adapters, in float64.
        unedited: of the model without JoLA's edits.
        tolerance: the error that rounding can cause.
    """

    inputs: dict[str, Any]
    output: Tensor
    unedited: Tensor
    tolerance: float

    @property
    def edit(self) -> float:
        """The largest change of the output by the adapters."""
        return float((self.output - self.unedited).abs().max())

    def error(self, model: nn.Module) -> float:
        """The largest error of another model's output."""
        output = run(model, self.inputs)
        if output.shape != self.output.shape:
            return float("inf")
        error = (output - self.output).abs().max()
        return float(error) if bool(error.isfinite()) else float("inf")


class Merged(NamedTuple):
    """Record of a model saved by `save_merged` or `save_gguf`, and of its verification.

    Attributes:
        path: the folder or file.
        targets: the target runtimes.
        place: the placement of the additive edits, in words.
        checked_in: the runtime in which it was verified; "" with `verify=False`.
        error: the largest error of its outputs (in vLLM and llama.cpp: of the next token's log-probabilities).
        tolerance: the error that rounding can cause.
        edit: the largest change of the outputs by the adapters.
    """

    path: str
    targets: tuple[str, ...]
    place: str
    checked_in: str = ""
    error: float = 0.0
    tolerance: float = 0.0
    edit: float = 0.0

    def judged(self, expected: Expected, tolerance: float) -> Merged:
        """The record with its tolerance, if the error is within it.

        Raises:
            ValueError: the error exceeds the tolerance.
        """
        result = self._replace(tolerance=tolerance, edit=expected.edit)
        if not self.error <= tolerance:
            raise ValueError(f"The merged model is not what was adapted, so it was not saved. {result}")
        return result

    def __str__(self) -> str:
        checked = (
            f"run in {RUNTIMES[self.checked_in].name}, it is off by {self.error:.2g} where rounding allows "
            f"{self.tolerance:.2g} and the adapters do {self.edit:.2g}"
            if self.checked_in
            else "not run"
        )
        return f"{self.path} for {', '.join(self.targets)}: additive edits in {self.place}; {checked}"


def random_inputs(model: Any) -> dict[str, Any]:
    """Random inputs for one forward of a transformers model, the same in every process."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    accepted = inspect.signature(model.forward).parameters
    parts = [config, *(getattr(config, name, None) for name in ("text_config", "vision_config", "encoder", "decoder"))]

    def setting(name: str, otherwise: Any) -> Any:
        return next((getattr(part, name) for part in parts if getattr(part, name, None) is not None), otherwise)

    def tokens(length: int) -> Tensor:
        return torch.randint(3, max(4, setting("vocab_size", 32)), (_ROWS, length), generator=generator)

    values: dict[str, Any] = {}
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values" or ({"input_ids", "pixel_values"} <= accepted.keys() and "image" not in str(main)):
        size = setting("image_size", 224)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape = (_ROWS, setting("num_channels", 3), height, width)
        if main == "pixel_values" or not hasattr(config, "image_token_id"):
            values["pixel_values"] = torch.randn(shape, generator=generator)
    if main == "input_values":
        values["input_values"] = torch.randn(_ROWS, 4000, generator=generator)
    elif main == "input_features":
        length = 2 * setting("max_source_positions", 1500)
        values["input_features"] = torch.randn(_ROWS, setting("num_mel_bins", 80), length, generator=generator)
    elif "input_ids" in accepted:
        values["input_ids"] = tokens(_TOKENS)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        values["decoder_input_ids"] = tokens(_TOKENS // 2)
    return values


@torch.no_grad()
def run(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The first tensor of a model's output in evaluation mode, in float64 on the CPU."""
    modes = {module: module.training for module in model.modules()}
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    try:
        model.eval()
        values = {
            key: value.to(device, dtype if value.is_floating_point() else value.dtype) for key, value in inputs.items()
        }
        with _capped_scores(model):
            output = model(**values)
    finally:
        for module, mode in modes.items():
            module.training = mode
    parts = output.to_tuple() if hasattr(output, "to_tuple") else output if isinstance(output, tuple) else (output,)
    return next(part for part in parts if isinstance(part, Tensor)).double().cpu()


def expect(model: Any, inputs: Mapping[str, Any] | None) -> Expected:
    """Runs a model with its adapters to obtain the expected output of its merged form.

    The tolerance is four times the change of the outputs when the input of every linear layer is perturbed by an ulp of the
    weights' dtype, with random signs: merging rounds every weight once more, by at most half an ulp, and another runtime
    rounds elsewhere. (For a quantised projection, the perturbation is the error of quantising the merged weight.) Users'
    hooks on JoLA's layers do not run.

    Args:
        model: a transformers model with adapters, unmerged.
        inputs: of one forward; None: random ones.

    Raises:
        ValueError: the model does not run on random inputs, or its output is not finite.
    """
    values = dict(random_inputs(model) if inputs is None else inputs)
    with _without_hooks(model):
        try:
            output = run(model, values)
        except Exception as error:
            if inputs is not None:
                raise
            raise ValueError(
                f"{type(model).__name__} does not run on the random inputs {sorted(values)} for the comparison with the saved "
                f"model ({type(error).__name__}: {error}); pass inputs=, or verify=False"
            ) from error
        if not bool(output.isfinite().all()):
            raise ValueError("the model's outputs have NaN or infinity with these adapters; nothing was saved")
        noise, lost = 0.0, _lost(model)
        for seed in range(2):
            with _rounding(model, seed, lost):
                noise = max(noise, float((run(model, values) - output).abs().max()))
        with _disabled(model):
            unedited = run(model, values)
    return Expected(values, output, unedited, 4 * noise)


def _lost(model: nn.Module) -> dict[nn.Module, float]:
    """The relative error of merging each quantised projection, measured by merging and unmerging."""
    lost: dict[nn.Module, float] = {}
    for layer in jola_layers(model):
        if layer.check_merge() and packing(layer.get_base_layer(), layer.site).quantised:
            layer.merge()
            lost[layer.get_base_layer()] = layer.merge_error
            layer.unmerge()
    return lost


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    kept = [(layer, layer._forward_pre_hooks, layer._forward_hooks) for layer in jola_layers(model)]
    try:
        for layer, *_ in kept:
            layer._forward_pre_hooks, layer._forward_hooks = (
                type(layer._forward_pre_hooks)(),
                type(layer._forward_hooks)(),
            )
        yield
    finally:
        for layer, before, after in kept:
            layer._forward_pre_hooks, layer._forward_hooks = before, after


@contextmanager
def _capped_scores(model: nn.Module) -> Iterator[None]:
    """Use eager attention for models with capped attention scores: transformers' "sdpa" ignores the cap, runtimes do not."""
    configs = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None
    }
    capped = [
        config
        for config in configs.values()
        if getattr(config, "attn_logit_softcapping", None) and getattr(config, "_attn_implementation", "") == "sdpa"
    ]
    try:
        for config in capped:
            config._attn_implementation = "eager"
        yield
    finally:
        for config in capped:
            config._attn_implementation = "sdpa"


@contextmanager
def _disabled(model: nn.Module) -> Iterator[None]:
    layers: list[JolaLayer] = [layer for layer in jola_layers(model) if not layer.disable_adapters]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextmanager
def _rounding(model: nn.Module, seed: int, lost: dict[nn.Module, float]) -> Iterator[None]:
    """Context in which every linear layer's input is perturbed by an ulp of its weight's dtype, or by its quantisation error."""
    generator = torch.Generator().manual_seed(seed)

    def perturb(module: nn.Module, args: Any) -> Any:
        x = args[0]
        weight: Any = getattr(module, "weight", x)
        dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else x.dtype
        eps = max(torch.finfo(dtype).eps, lost.get(module, 0.0))
        if type(weight).__name__ == "Int8Params":
            eps = max(eps, 1 / 254)  # bitsandbytes quantises inputs too: half a step of 127
        signs = torch.randint(0, 2, x.shape, generator=generator).to(x.device, x.dtype) * 2 - 1
        return (x * (1 + eps * signs), *args[1:])

    handles = [
        module.register_forward_pre_hook(perturb)
        for _, module in unwrapped(model)
        if linear_shape(module) is not None and not hasattr(module, "base_layer")
    ]
    # also the layers below adapters
    handles += [layer.get_base_layer().register_forward_pre_hook(perturb) for layer in jola_layers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
