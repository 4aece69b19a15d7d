"""Applies and reverts the changes of steering: a steered module's class is swapped for a subclass.

The module stays the same object, so hooks, parameters, references to it and ``isinstance`` keep working. Steering adds
entries to its ``__dict__``; removing them and restoring the class leaves the module as it was.
"""

from __future__ import annotations

import copyreg
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from .. import _marks
from .activations import ActivationSpec
from .rewrite import ClassCode
from .runtime import SiteUnit, call_module, runs

MODULE = ""  # the key of the unit of an activation module itself


class Steered:
    """Mixin of steered classes. ``_ctu``: {key of a site: its unit}."""

    _ctu: dict[str, SiteUnit]
    _ctu_base: type[nn.Module]
    _ctu_recipe: tuple[Any, ...]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Does not call super: registries of subclasses must not see a temporary class."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[misc]
        for unit in self._ctu.values():
            unit.move(fn)
        return self

    def extra_repr(self) -> str:
        units = {key: unit.summary() for key, unit in self._ctu.items()}
        shown = (f"{key}: {text}" if key else text for key, text in units.items() if text)
        return ", ".join(part for part in (super().extra_repr(), *shown) if part)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(max(2, int(protocol)))
        cls = type(self)
        if not isinstance(reduced, tuple) or reduced[0] is not copyreg.__newobj__ or reduced[1] != (cls,):  # type: ignore[attr-defined]
            raise TypeError(f"cannot copy or pickle a steered {cls.__name__}, which has its own way to; remove() first")
        return (_new, cls._ctu_recipe, *reduced[2:])

    def __prepare_scriptable__(self) -> Any:
        """Called first by ``torch.jit.script``; refuses it."""
        raise TypeError(
            f"torch.jit.script: expected a model that is not steered, got a steered {type(self).__name__}; use torch.export, "
            "torch.compile or torch.jit.trace, or remove() first"
        )


class _ActivationMixin(Steered):
    """For activation modules."""

    _ctu_spec: ActivationSpec

    def forward(self, input: Tensor, site: str = MODULE) -> Tensor:
        unit = self._ctu[site]
        if runs(unit, input):
            return call_module(self, self._ctu_spec, unit, input)
        return super().forward(input)  # type: ignore[misc]

    def ctu_arguments(self, x: Tensor, site: str = MODULE) -> dict[str, Any] | None:
        """:meth:`SiteUnit.ctu_arguments` of a call; None if the unit does not run."""
        unit, spec = self._ctu[site], self._ctu_spec
        if not runs(unit, x):
            return None
        return unit.ctu_arguments(x, spec.activation, getattr(self, spec.slope) if spec.slope is not None else None)


class _EncoderLayerMixin(Steered):
    """For ``nn.TransformerEncoderLayer``: in inference it calls a fused kernel that bypasses the activation, unless this flag
    says that the kernel does not support it."""

    @property
    def activation_relu_or_gelu(self) -> int:
        activation = self.__dict__.get("activation", self._modules.get("activation"))  # type: ignore[attr-defined]
        units = [*self._ctu.values(), *(activation._ctu.values() if isinstance(activation, Steered) else ())]
        return 0 if any(unit.active for unit in units) else self.__dict__.get("activation_relu_or_gelu", 0)

    @activation_relu_or_gelu.setter
    def activation_relu_or_gelu(self, value: int) -> None:
        self.__dict__["activation_relu_or_gelu"] = value


class _EncoderMixin(Steered):
    """For ``nn.TransformerEncoder``: in inference it may pass its layers a nested tensor, which only their fused kernel
    accepts."""

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
    """For containers: units registered as children are not items."""

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
    """For containers with named items."""

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


# Modules of torch that bypass activations they know.
FAST_PATHS = (nn.TransformerEncoderLayer, nn.TransformerEncoder)
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
    """The steered subclass of ``base``: of an activation module (``selection`` None), or of one that calls activations.

    ``children``: attributes with activation modules whose calls are separate sites.
    """
    recipe = (base, selection, children)
    cls = _CLASSES.get(recipe)
    if cls is not None:
        return cls
    parents: tuple[type, ...]
    if selection is None:
        parents, namespace = (_ActivationMixin, base), {}
    else:
        kind = next((kind for kind in _MIXINS if issubclass(base, kind)), nn.Module)
        mixin = _MIXINS.get(kind, Steered)
        parents, namespace = (mixin, base), dict((code or ClassCode(base, selection, {}, children)).namespace)
        for name in vars(mixin).keys() & dir(kind) if kind in _MIXINS else ():
            member = inspect.getattr_static(base, name)
            if member is not inspect.getattr_static(kind, name):  # the user's override takes precedence
                namespace.setdefault(name, member)
    # The original's name and module, on which print(model), wrapping policies and tracers depend.
    namespace |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    namespace |= {_marks.BASE: base, _marks.RECIPE: recipe}
    cls = types.new_class(base.__name__, parents, exec_body=lambda space: space.update(namespace))
    _CLASSES[recipe] = cls
    return cls


def _new(*recipe: Any) -> Any:
    """An empty steered module, for copying and unpickling."""
    cls = steered_class(*recipe)
    return cls.__new__(cls)  # type: ignore[call-overload]


class ClassSwap(NamedTuple):
    """A module to steer: its new class, the units of its sites, and its spec if it is an activation."""

    module: nn.Module
    cls: type
    units: dict[str, SiteUnit]
    spec: ActivationSpec | None


class AttributeEdit(NamedTuple):
    """A new value for an entry of ``owner.__dict__`` or ``owner._modules``."""

    owner: nn.Module
    space: str
    name: str
    old: Any
    new: Any


class LocalCopy(NamedTuple):
    """A copy that replaces a module in one model.

    Models may share a module inadvertently: as a default argument, or a class attribute. ``state``: the original's
    ``__dict__`` when the copy was made.
    """

    original: nn.Module
    copy: nn.Module
    state: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module) -> LocalCopy:
        """Copies ``module``, sharing the containers of parameters, buffers and hooks, but not of children."""
        copy = object.__new__(type(module))
        copy.__dict__.update(module.__dict__, _modules=dict(module._modules))
        return cls(module, copy, dict(copy.__dict__))

    def write_back(self) -> None:
        """Applies changes made to the copy (mode, attributes, an overridden forward) to the original."""
        for name, value in self.copy.__dict__.items():
            if name != "_modules" and name not in _marks.ON_STEERED and self.state.get(name, _ABSENT) is not value:
                self.original.__dict__[name] = value
        for name in self.state.keys() - self.copy.__dict__.keys():
            self.original.__dict__.pop(name, None)


_ABSENT = object()


def apply_patches(swaps: list[ClassSwap], edits: list[AttributeEdit]) -> None:
    """Applies all changes; on an error, none."""
    done_swaps: list[nn.Module] = []
    done_edits: list[AttributeEdit] = []
    try:
        for swap in swaps:
            swap.module.__dict__[_marks.UNITS] = swap.units
            if swap.spec is not None:
                swap.module.__dict__[_marks.SPEC] = swap.spec
            swap.module.__class__ = swap.cls  # last: another thread may be calling the module
            done_swaps.append(swap.module)
        for edit in edits:
            getattr(edit.owner, edit.space)[edit.name] = edit.new
            done_edits.append(edit)
    except BaseException:
        revert_patches(done_swaps, done_edits, [])
        for swap in swaps[len(done_swaps) :]:
            for name in _marks.ON_STEERED:
                swap.module.__dict__.pop(name, None)
        raise


def revert_patches(modules: list[nn.Module], edits: list[AttributeEdit], copies: list[LocalCopy]) -> None:
    """Reverts :func:`apply_patches`. Raises, before touching the model, if a module's class has changed since.

    An attribute that was replaced since, by a wrapper for example, keeps its value.
    """
    for module in modules:
        if _marks.BASE not in vars(type(module)):
            raise RuntimeError(
                f"model: expected every module to have the class that steer() gave it, got {type(module).__name__}; "
                "first undo what was done to the model since (FSDP, a parametrization)"
            )
    copied = {id(copy.copy) for copy in copies}  # another thread may be running one: it keeps its units
    for module in modules:
        module.__class__ = type(module)._ctu_base  # type: ignore[attr-defined]
        for name in _marks.ON_STEERED if id(module) not in copied else ():
            module.__dict__.pop(name, None)
    for edit in reversed(edits):
        space = getattr(edit.owner, edit.space)
        if not _same(space.get(edit.name), edit.new):
            continue
        old = edit.old
        if isinstance(old, types.MethodType):  # after unpickling, it is the steered class's: look it up again
            method = getattr(old.__self__, old.__func__.__name__)
            old = old if method == old else method
        space[edit.name] = old
    for copy in copies:
        copy.write_back()


def _same(value: Any, expected: Any) -> bool:
    return value is expected or (isinstance(expected, types.MethodType) and value == expected)
