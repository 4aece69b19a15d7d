"""``fuse`` and the handle it returns."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from .. import _marks
from . import memory_format
from .layers import is_unit, why_not
from .match import Match, Norms, find
from .pooling import Pooling, poolings
from .program import Program
from .shadow import Untraceable
from .site import FusedSite
from .trace import argument_count, is_stand_in, trace

_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def fuse(model: nn.Module) -> Fusion:
    """Fuses BatchNorms, residual sums and gated products of ``model`` into the passes of its CT units, reversibly.

    Recognises these patterns in the ``torch.fx`` graph of each module's forward, whatever the classes are called:

    - convolution or linear layer -> BatchNorm -> CT unit, optionally with a sum of two tensors before the unit; any part
      but the last may be missing;
    - convolution or linear layer -> BatchNorm, before anything;
    - the same with a BatchNorm that calls the activation itself, such as timm's ``BatchNormAct2d``;
    - CT unit -> product with a second tensor, as in the gated MLPs of language models (Llama, Qwen, Mistral, Gemma), with or
      without the linear layer before the unit; also if gate and second tensor are halves (``chunk``) of one projection
      (Phi-3, GLM). Both run in one pass, :func:`ctkernels.functional.ctu_and_mul`, forward and backward.

    CT units are those of :func:`steer`, those of a :class:`ctkernels.adapters.CurvatureConfig`, learned or merged, and the
    modules of :mod:`ctkernels.nn`. In a model without any, BatchNorms are folded into layers, and activations stay unchanged.

    Every call decides what runs:

    - BatchNorm in evaluation: the unit applies its scale and shift, and computes their gradients if needed. In inference
      the unit works in place; if a gradient flows through a frozen layer, only the unit's input is saved for the backward
      pass. Without a following unit, it is folded into the layer's weights if these are smaller than the result. Nothing is
      cached between calls, so weights may be written in any way.
    - BatchNorm in training: one pass computes the batch statistics, and the unit does the rest. Running statistics are
      updated as without fusion.
    - Large contiguous images, in inference on the CPU: everything runs in channels last, with contiguous results;
      ``handle.explain`` tells whether, and why not.
    - ``torch.compile`` and ``torch.export``: the same, in one graph. On the CPU, compiled training steps pool with torch's
      own kernels; for that, every ``nn.MaxPool2d`` gets a forward too.

    Outputs and gradients equal those of the unfused model within rounding. The model stays the same object with the same
    modules, parameters and ``state_dict``, which can be saved and loaded at any time; the handle of :func:`steer` keeps
    working. It can be copied, pickled, cast, moved and compiled; call a copy once before compiling it.

    Code that cannot be traced reliably is left alone: modules whose path depends on values, that keep state between calls or
    whose forward has optional arguments (modules below them are still fused), layers with code of their own, hooks or
    parametrized weights (even if added later), and sites whose intermediate values are used elsewhere. ``handle.left`` has
    the modules and the reasons.

    Args:
        model: any module.

    Returns:
        Fusion: the handle. As a context manager, it removes itself on exit.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the model is already fused, or there is nothing to fuse. The model is unchanged.
        RuntimeError: a forward stored placeholders of the tracing in a cache that cannot be cleared; the message names it.

    Examples:
        >>> steering = ctkernels.steer(model, beta=0.9)
        >>> handle = ctkernels.fuse(model)
        >>> handle.remove()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if any(isinstance(vars(m).get("forward"), Program) for m in model.modules()):
        raise ValueError("model: expected one that is not fused, got one that is; handle.remove() gives it back")
    names = {module: name for name, module in model.named_modules()}
    programs: list[Program] = []
    all_sites: list[FusedSite] = []
    left: dict[str, str] = {}
    norms = Norms()
    inlines: dict[nn.Module, list[nn.Module] | None] = {}
    opaque: set[nn.Module] = set()
    for module, name in reversed(names.items()):  # inner modules first: if untraceable, they stay opaque to outer ones
        try:
            inlines[module] = _inline(module, norms, opaque)
        except Untraceable as reason:
            left[name] = str(reason)
            opaque.add(module)
    left = dict(reversed(left.items()))
    for module in names:
        inline = inlines.get(module)
        if inline is not None:
            program = Program(module, inline)
            _add(all_sites, [_site(match, module, names, norms) for match in program.prepare(norms)])
            programs.append(program)
    if not programs:
        raise ValueError(
            f"model: expected {type(model).__name__} to have a BatchNorm or a CT unit after a layer; got none that can be "
            f"fused{_lines(left | _alone(names, (), left), 8)}"
        )
    # A part of a site may be another site in an inner module, for calls of that module alone.
    longer = {(site.layer, site.norm) for site in all_sites if site.unit}
    sites = dict.fromkeys(site for site in all_sites if site.unit or (site.layer, site.norm) not in longer)
    pooled = poolings(model)
    forwards = {program.scopes[0]: program for program in programs} | pooled
    left |= _alone(names, tuple(sites), left)
    handle = Fusion(model, forwards, tuple(sites), tuple(names[module] for module in pooled), left)
    for module, forward in forwards.items():
        module.__dict__[_marks.FORWARD] = forward
    model.__dict__[_marks.FUSION] = handle
    return handle


class Fusion:
    """Handle of a fused model, returned by :func:`fuse`.

    Attributes:
        sites: the fused sites, a tuple of :class:`FusedSite`.
        poolings: names of the ``nn.MaxPool2d`` modules whose forward was replaced by an equal one.
        left: {module name: reason} of what was left alone: modules that cannot be traced (the whole model is ""), and single
            layers, BatchNorms and units.
    """

    def __init__(
        self,
        model: nn.Module,
        forwards: dict[nn.Module, Program | Pooling],
        sites: tuple[FusedSite, ...],
        poolings: tuple[str, ...],
        left: dict[str, str],
    ) -> None:
        self._model, self._forwards, self._active = model, forwards, True
        self.sites, self.poolings, self.left = sites, poolings, left

    def remove(self) -> None:
        """Restores the original model, bit for bit. A second call does nothing.

        Raises:
            RuntimeError: the forward of a module was replaced since; nothing is changed.
        """
        if not self._active:
            return
        for module, forward in self._forwards.items():
            current = vars(module).get("forward")
            if current is not forward:
                raise RuntimeError(
                    f"model: expected every module to have the forward that fuse() gave it, got {current!r} in a "
                    f"{type(module).__name__}; first undo what was done to the model since"
                )
        for module in self._forwards:
            del module.__dict__[_marks.FORWARD]
        self._model.__dict__.pop(_marks.FUSION, None)
        self._active = False
        _check_nothing_left(self._model)

    def explain(self, *args: Any) -> str:
        """Says which memory format an eager call of the model with ``args`` would use inside, and why.

        Examples:
            >>> handle = ctkernels.fuse(model)
            >>> with torch.no_grad():
            ...     print(handle.explain(x))
            Network: the format of its arguments: 1024 pixels are fewer than 32768
        """
        program = self._forwards.get(self._model) if self._active else None
        if not isinstance(program, Program):
            reason = "its own forward is not fused"
        else:
            program.path(args)  # traces it, as a call would
            reason = memory_format.why_not_now(args) or memory_format.obstacle(program, len(args))
        if reason:
            return f"{type(self._model).__name__}: the format of its arguments: {reason}"
        return (
            f"{type(self._model).__name__}: channels last, in which convolutions and units of large images are faster; its "
            "results are contiguous"
        )

    def __enter__(self) -> Fusion:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = f"{len(self.sites)} sites" if self._active else "removed"
        lines = [f"Fusion of {type(self._model).__name__}: {state}", *(f"    {site}" for site in self.sites)]
        lines += [f"    {name}: the pooling of compiled training steps" for name in self.poolings]
        return "\n".join(lines) + _lines(self.left)


def _add(sites: list[FusedSite], more: list[FusedSite]) -> None:
    """Adds the sites of an inner module to those of its parents.

    Of two sites with the same sum, keeps the one with more parts: traced from outside, the other branch may have become the
    main one.
    """

    def parts(site: FusedSite) -> int:
        return bool(site.layer) + bool(site.norm)

    outer = {site.unit: i for i, site in enumerate(sites) if site.residual and site.unit}
    for site in more:
        rival = outer.get(site.unit) if site.residual else None
        if rival is None:
            sites.append(site)
        elif parts(site) > parts(sites[rival]):
            sites[rival] = site


def _check_nothing_left(model: nn.Module) -> None:
    """Raises RuntimeError if a module still refers to something of a fusion."""

    def is_left(value: Any) -> bool:
        return isinstance(value, (Program, Pooling, Fusion)) or is_stand_in(value)

    for name, module in model.named_modules():
        for key, value in vars(module).items():
            inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
            if is_left(value) or any(map(is_left, inside)):
                raise RuntimeError(
                    f"model: expected nothing of fuse() to be left after remove(), got {key!r} of {name or 'the model'}, a "
                    f"{type(module).__name__}: something has copied it there while the model was fused; take it away"
                )


def _alone(names: dict[nn.Module, str], sites: tuple[FusedSite, ...], left: dict[str, str]) -> dict[str, str]:
    """{name: reason} of layers, BatchNorms and units in no site, unless ``left`` has a parent of theirs."""
    taken = {name for site in sites for name in (site.layer, site.norm, site.unit)}
    reasons = {}
    for module, name in names.items():
        around = [name[:i] for i, letter in enumerate(name) if letter == "."] + [""]
        if name in taken or not name or any(outer in left for outer in around):
            continue
        if isinstance(module, (*_LAYERS, _BATCH_NORM)):
            reason = why_not(module)
            if isinstance(module, _BATCH_NORM):
                reason = reason or "no layer before it, or no unit after it, that nothing else reads the values of"
            reasons.update({name: reason} if reason else {})
        elif is_unit(module):
            reasons[name] = (
                "no layer, BatchNorm or sum before it, nor product after it, that nothing else reads the values of"
            )
    return reasons


def _lines(left: dict[str, str], most: int | None = None) -> str:
    """A line per module that was left alone; at most ``most`` of them, then the number of the rest."""
    lines = [f"\n    {name or '(the model)'} was left alone: {reason}" for name, reason in left.items()]
    return "".join(lines[:most]) + (f"\n    and {len(lines) - most} more" if most and len(lines) > most else "")


def _inline(module: nn.Module, norms: Norms, opaque: set[nn.Module]) -> list[nn.Module] | None:
    """The modules below ``module`` to trace with it, for sites that span several modules; None: no site.

    Raises Untraceable if ``module``'s own code calls layers and cannot be traced.
    """
    if (
        not module._modules
        or "forward" in vars(module)
        or isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule))
    ):
        return None
    if type(module).forward is nn.Module.forward:  # a container that is never called
        return None
    if hasattr(type(module), "ctu_arguments") or isinstance(module, _BATCH_NORM):  # a part of its caller's sites
        return None
    count = argument_count(module)
    if count is None:
        raise Untraceable("its forward has optional arguments")
    try:
        return _spanned(module, None, count, norms, opaque)
    except Untraceable:
        return _spanned(module, (), count, norms, opaque)


def _spanned(
    module: nn.Module, inline: Collection[nn.Module] | None, count: int, norms: Norms, opaque: set[nn.Module]
) -> list[nn.Module] | None:
    """The modules that the sites of ``module`` span, of those in ``inline``; None: no site."""
    traced = trace(module, inline, ("tensor",) * count, {}, opaque)
    modules: dict[nn.Module, None] = {}
    has_site = False
    for match in find(module, traced.graph, norms):
        operands = [node for joint in (match.add, match.product) if joint is not None for node in joint.all_input_nodes]
        paths = [traced.scopes[node] for node in (*match.nodes, *operands)]
        if any(len(path) == 0 for path in paths) or len({path[0] for path in paths}) > 1:
            has_site = True
            modules.update(dict.fromkeys(m for path in paths for m in path))
    return list(modules) if has_site else None


def _site(match: Match, module: nn.Module, names: dict[nn.Module, str], norms: Norms) -> FusedSite:
    def name(node: Any) -> str:
        if node is None:
            return ""
        if node.op == "call_module":
            return names[module.get_submodule(node.target)]
        call = node.target  # a steered call of a function: its name in the sites of the steering
        return f"{names[call.owner]}.{call.key}:{call.signature.activation}".lstrip(".")

    norm = norms(module.get_submodule(str(match.norm.target))) if match.norm is not None else None
    unit = names[norm.unit] if norm is not None and norm.unit is not None else name(match.unit)
    return FusedSite(name(match.source), name(match.norm), match.add is not None, unit, match.product is not None)
