"""Steering a module without replacing it: its class is exchanged for a subclass, and back.

The module stays the same object, so everything that hangs on it stays: hooks, parameters and their names, every place
that refers to it, ``isinstance``. What is added is one entry in its ``__dict__``; taking that away and giving the class
back leaves the module as it was.
"""

from __future__ import annotations

import copyreg
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from .activations import Use
from .class_code import ClassCode
from .unit import SiteKnobs, Unit, arguments, call_module, runs

MODULE = ""  # the key of a module's own knobs, where the module itself is the activation


class Steered:
    """What a steered module's class has beyond its original one. ``_ctu``: {key: the knobs of one site}."""

    _ctu: dict[str, SiteKnobs | Unit]
    _ctu_base: type[nn.Module]
    _ctu_recipe: tuple[Any, ...]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Deliberately not passed on: a registry of subclasses must not hear of a class that exists for a while."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[misc]
        for knobs in self._ctu.values():
            if isinstance(knobs, SiteKnobs):  # not a child: it is in nobody's state_dict
                knobs._apply(fn)
        return self

    def extra_repr(self) -> str:
        own = super().extra_repr()  # type: ignore[misc]
        held = {key: knobs.extra_repr() for key, knobs in self._ctu.items() if isinstance(knobs, SiteKnobs)}
        values = (f"{key}: {shown}" if key else shown for key, shown in held.items())
        return ", ".join(part for part in (own, *values) if part)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(max(2, int(protocol)))
        cls = type(self)
        if not isinstance(reduced, tuple) or reduced[0] is not copyreg.__newobj__ or reduced[1] != (cls,):  # type: ignore[attr-defined]
            raise TypeError(f"cannot copy or pickle a steered {cls.__name__}, which has its own way to; remove() first")
        return (_new, cls._ctu_recipe, *reduced[2:])

    def __prepare_scriptable__(self) -> Any:
        """What ``torch.jit.script`` asks first."""
        raise TypeError(
            f"torch.jit.script: expected a model that is not steered, got a steered {type(self).__name__}; use torch.export, "
            "torch.compile or torch.jit.trace, or remove() first"
        )


class _UnitMixin(Steered):
    _ctu_use: Use

    def forward(self, input: Tensor, site: str = MODULE) -> Tensor:
        knobs = self._ctu[site]
        if runs(knobs, input):
            return call_module(self, self._ctu_use, knobs, input)
        return super().forward(input)  # type: ignore[misc]

    def ctu_arguments(self, x: Tensor, site: str = MODULE) -> dict[str, Any] | None:
        use, knobs = self._ctu_use, self._ctu[site]
        if not runs(knobs, x):
            return None
        slope = getattr(self, use.slope) if use.slope else None
        return arguments(knobs, x.device, use.activation, slope)


class _EncoderLayerMixin(Steered):
    """For ``nn.TransformerEncoderLayer``: in inference it may call a fused kernel, past its activation, unless this flag
    says that it has another one than the kernel knows."""

    @property
    def activation_relu_or_gelu(self) -> int:
        activation = self.__dict__.get("activation", self._modules.get("activation"))  # type: ignore[attr-defined]
        units = [*self._ctu.values(), *(activation._ctu.values() if isinstance(activation, Steered) else ())]
        return 0 if any(unit.active for unit in units) else self.__dict__.get("activation_relu_or_gelu", 0)

    @activation_relu_or_gelu.setter
    def activation_relu_or_gelu(self, value: int) -> None:
        self.__dict__["activation_relu_or_gelu"] = value


class _EncoderMixin(Steered):
    """For ``nn.TransformerEncoder``: in inference it may hand its layers a nested tensor, which only their fused kernel
    takes."""

    @property
    def use_nested_tensor(self) -> bool:
        layers: Any = self.layers  # type: ignore[attr-defined]
        return self.__dict__.get("use_nested_tensor", False) and all(
            getattr(layer, "activation_relu_or_gelu", True) for layer in layers
        )

    @use_nested_tensor.setter
    def use_nested_tensor(self, value: bool) -> None:
        self.__dict__["use_nested_tensor"] = value


class _ContainerMixin(Steered):
    """For a container, which runs whatever is registered in it: a unit that is, is no item of it."""

    def __iter__(self) -> Any:
        return iter([item for _, item in self._ctu_items()])

    def __len__(self) -> int:
        return len(self._ctu_items())

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return (
                nn.Sequential(*list(self)[index])
                if isinstance(self, nn.Sequential)
                else nn.ModuleList(list(self)[index])
            )
        return list(self)[index]

    def _ctu_items(self) -> list[tuple[str, Any]]:
        modules: dict[str, Any] = self._modules  # type: ignore[attr-defined]
        return [(name, item) for name, item in modules.items() if not any(item is k for k in self._ctu.values())]


class _ModuleDictMixin(_ContainerMixin):
    """The same for a container whose items have names."""

    def __iter__(self) -> Any:
        return iter([name for name, _ in self._ctu_items()])

    def __getitem__(self, key: str) -> Any:
        return dict(self._ctu_items())[key]

    def __contains__(self, key: object) -> bool:
        return key in dict(self._ctu_items())

    def keys(self) -> Any:
        return dict(self._ctu_items()).keys()

    def values(self) -> Any:
        return dict(self._ctu_items()).values()

    def items(self) -> Any:
        return dict(self._ctu_items()).items()


# Modules of torch that decide by their activations which way they go.
DECIDING = (nn.TransformerEncoderLayer, nn.TransformerEncoder)
_MIXINS: dict[type[nn.Module], type] = {
    nn.TransformerEncoderLayer: _EncoderLayerMixin,
    nn.TransformerEncoder: _EncoderMixin,
    nn.Sequential: _ContainerMixin,
    nn.ModuleList: _ContainerMixin,
    nn.ModuleDict: _ModuleDictMixin,
}

_CLASSES: weakref.WeakValueDictionary[Any, type] = weakref.WeakValueDictionary()


def steered_class(
    base: type[nn.Module],
    selection: frozenset[str] | None,
    children: frozenset[str] = frozenset(),
    code: ClassCode | None = None,
) -> type:
    """The steered subclass of ``base``: an activation module (``selection`` None), or one that calls activations.

    ``children``: the attributes that hold activation modules whose calls are told apart.
    """
    recipe = (base, selection, children)
    found = _CLASSES.get(recipe)
    if found is not None:
        return found
    parents: tuple[type, ...]
    if selection is None:
        parents, namespace = (_UnitMixin, base), {}
    else:
        kind = next((kind for kind in _MIXINS if issubclass(base, kind)), nn.Module)
        mixin = _MIXINS.get(kind, Steered)
        parents, namespace = (mixin, base), dict((code or ClassCode(base, selection, {}, children)).namespace)
        for name in vars(mixin).keys() & dir(kind) if kind in _MIXINS else ():
            own = inspect.getattr_static(base, name)
            if own is not inspect.getattr_static(kind, name):  # the user's own way comes first
                namespace.setdefault(name, own)
    # The name and module of the original: print(model), wrapping policies and tracers go by them.
    namespace |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    namespace |= {"_ctu_base": base, "_ctu_recipe": recipe}
    made = types.new_class(base.__name__, parents, exec_body=lambda space: space.update(namespace))
    _CLASSES[recipe] = made
    return made


def _new(*recipe: Any) -> Any:
    """An empty steered module: where copying and unpickling start."""
    cls = steered_class(*recipe)
    return cls.__new__(cls)  # type: ignore[call-overload]


class Swap(NamedTuple):
    """A module to be steered, and what it is to hold."""

    module: nn.Module
    cls: type
    knobs: dict[str, SiteKnobs | Unit]
    use: Use | None


class Edit(NamedTuple):
    """An entry of ``owner.__dict__`` or ``owner._modules`` that gets another value."""

    owner: nn.Module
    space: str
    name: str
    old: Any
    new: Any


class Copy(NamedTuple):
    """A module that stands in for another one in one model only.

    Models may share an object without knowing: a default argument, an attribute of a class. ``state``: the original's
    ``__dict__`` as it was when the copy was made.
    """

    original: nn.Module
    copy: nn.Module
    state: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module) -> Copy:
        """A copy with the same parameters, buffers and hooks (the very containers of them), and children of its own."""
        twin = object.__new__(type(module))
        twin.__dict__.update(module.__dict__, _modules=dict(module._modules))
        return cls(module, twin, dict(twin.__dict__))

    def hand_back(self) -> None:
        """Pass on what was done to the copy while it stood in: to its mode, an attribute, a forward of its own."""
        for name, value in self.copy.__dict__.items():
            if name != "_modules" and name not in _OURS and self.state.get(name, _ABSENT) is not value:
                self.original.__dict__[name] = value
        for name in self.state.keys() - self.copy.__dict__.keys():
            self.original.__dict__.pop(name, None)


_ABSENT = object()
_OURS = ("_ctu", "_ctu_use")


def operate(swaps: list[Swap], edits: list[Edit]) -> None:
    """Do everything, or, on an error, nothing."""
    done_swaps: list[nn.Module] = []
    done_edits: list[Edit] = []
    try:
        for swap in swaps:
            swap.module.__dict__["_ctu"] = swap.knobs
            if swap.use is not None:
                swap.module.__dict__["_ctu_use"] = swap.use
            swap.module.__class__ = swap.cls  # last: another thread may be calling the module
            done_swaps.append(swap.module)
        for edit in edits:
            getattr(edit.owner, edit.space)[edit.name] = edit.new
            done_edits.append(edit)
    except BaseException:
        undo(done_swaps, done_edits, [])
        for swap in swaps[len(done_swaps) :]:
            for name in _OURS:
                swap.module.__dict__.pop(name, None)
        raise


def undo(modules: list[nn.Module], edits: list[Edit], copies: list[Copy]) -> None:
    """The way back. The model is not touched if something else has changed the class of a module since.

    An entry that something else was put into since, a wrapper say, keeps that: what it holds is steered no more.
    """
    for module in modules:
        if "_ctu_base" not in vars(type(module)):
            raise RuntimeError(
                f"model: expected every module to have the class that steer() gave it, got {type(module).__name__}; "
                "first undo what was done to the model since (FSDP, a parametrization)"
            )
    copied = {id(copy.copy) for copy in copies}  # another thread may be inside of one: it keeps what it runs with
    for module in modules:
        module.__class__ = type(module)._ctu_base  # type: ignore[attr-defined]
        for name in _OURS if id(module) not in copied else ():
            module.__dict__.pop(name, None)
    for edit in reversed(edits):
        space = getattr(edit.owner, edit.space)
        if not _same(space.get(edit.name), edit.new):
            continue
        old = edit.old
        if isinstance(old, types.MethodType):  # unpickled, it is the steered class's: ask the class it has now
            own = getattr(old.__self__, old.__func__.__name__)
            old = old if own == old else own
        space[edit.name] = old
    for copy in copies:
        copy.hand_back()


def _same(found: Any, expected: Any) -> bool:
    return found is expected or (isinstance(expected, types.MethodType) and found == expected)
