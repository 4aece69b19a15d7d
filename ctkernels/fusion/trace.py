"""Traces a module's forward into a ``torch.fx`` graph; refuses whenever the graph might differ from the module.

The forward runs once, on shadows of the modules (``shadow``) and with placeholders for the tensors, and the operations on them
are recorded. Nothing is patched: shadows see the calls of modules, and a ``TorchFunctionMode`` those of torch's functions; like
``sys.setprofile``, it only affects this thread.

Dependencies and side effects that a graph cannot express are detected while the forward runs, and the module is refused.
"""

from __future__ import annotations

import builtins
import dis
import functools
import inspect
import operator
import random
import sys
import traceback
from collections.abc import Collection, Sequence
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn
from torch.fx.immutable_collections import immutable_list
from torch.fx.proxy import Attribute, GraphAppendingTracer
from torch.overrides import TorchFunctionMode

from ..steering.runtime import StandIn, SteeredCall
from .leftovers import Namespaces, StandIns
from .overrides import is_open
from .shadow import Reads, Shadows, Untraceable

# The kind of an argument: "tensor", ("list", *kinds) or ("tuple", *kinds).
Kind = str | tuple[Any, ...]
_SEQUENCES: dict[type, str] = {list: "list", tuple: "tuple"}


def kind_of(value: Any) -> Kind | None:
    """The kind of an argument; None for others, with which the original forward runs."""
    if type(value) is Tensor or type(value) is nn.Parameter:
        return "tensor"
    name = _SEQUENCES.get(type(value))
    if name is None:
        return None
    kinds = [kind_of(v) for v in value]
    return None if None in kinds else (name, *kinds)


class Trace(NamedTuple):
    """scopes: {node: the modules in whose forward it was recorded, outermost first}. reads: what the graph depends on."""

    graph: torch.fx.Graph
    scopes: dict[torch.fx.Node, tuple[nn.Module, ...]]
    reads: Reads


_TRIES = 8


def trace(
    module: nn.Module,
    inline: Collection[nn.Module] | None,
    kinds: Sequence[Kind],
    training: dict[nn.Module, bool],
    opaque: set[nn.Module] | None = None,
) -> Trace:
    """Traces ``module``'s forward.

    Args:
        inline: submodules to trace into. None: all traceable ones except torch's layers.
        kinds: of the arguments.
        training: {module: its flag while tracing}; other modules keep theirs.
        opaque: with ``inline`` None, modules known to be untraceable; newly found ones are added.

    Raises:
        Untraceable: the forward cannot be traced.
        RuntimeError: it stored placeholders in places that cannot be cleared.
    """
    opaque = set() if opaque is None else opaque
    for tries_left in reversed(range(_TRIES)):
        tracer = _Tracer(module, inline, opaque, training)
        try:
            return _checked(tracer, kinds)
        except Untraceable:
            if inline is not None or not tracer.stack or not tries_left:
                raise
            opaque.add(tracer.stack[-1])  # call this submodule without tracing into it
    raise AssertionError("the last try returns or raises")


def _checked(tracer: _Tracer, kinds: Sequence[Kind]) -> Trace:
    """Runs the tracer, then makes sure that the forward left nothing behind."""
    state = random.getstate()
    reason, traced = "", None
    try:
        traced = tracer.run(kinds)
    except Exception as error:  # arbitrary code runs here, and any error means that it cannot be traced
        said = str(error) if isinstance(error, Untraceable) else f"it cannot be read: {_first_line(error)}"
        reason = tracer.shadows.refused or said
        _clear_frames(error)
    if random.getstate() != state:
        random.setstate(state)
        reason = reason or "it draws random numbers"
    stand_ins = tracer.stand_ins
    tracer.close()
    if stand_ins.any_alive():
        stand_ins.take_back(tracer.before)
        reason = "it keeps values, outside of the module, from one call to the next"
    if reason or traced is None:
        raise Untraceable(reason)
    return traced


def _clear_frames(error: BaseException | None) -> None:
    """Drops the references of an error's frames, which may be to placeholders."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- placeholders ------------------------------------------------------------------------------------------------------


class _TensorStandIn(Tensor, StandIn):
    """Placeholder of an argument, parameter or buffer: a tensor without values."""

    @staticmethod
    def make(
        tracer: _Tracer, op: str, target: Any, args: tuple[Any, ...] = (), is_parameter: bool = False
    ) -> _TensorStandIn:
        with torch._C.DisableTorchFunction():
            stand_in: Any = Tensor._make_subclass(_TensorStandIn, torch.empty(0, device="meta"))
        stand_in.tracer, stand_in.creation, stand_in.node = tracer, (op, target, args), None
        if is_parameter:
            stand_in._is_param = True
        tracer.watch(stand_in)
        return stand_in

    tracer: _Tracer
    creation: tuple[str, Any, tuple[Any, ...]]
    node: torch.fx.Node | None

    def recorded(self) -> torch.fx.Node:
        """Its node, created on first use."""
        if self.node is None:
            op, target, args = self.creation
            self.node = self.tracer.create_node(op, target, args, {})
        return self.node

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        stand_in = next(a for a in _flat((args, kwargs)) if isinstance(a, _TensorStandIn))
        return stand_in.tracer.function(func, args, kwargs or {})


def is_stand_in(value: Any) -> bool:
    return isinstance(value, (_TensorStandIn, _ValueStandIn))


class _ValueStandIn:
    """Mixin of placeholders for values of any type. Refuses code that queries the type, and may branch on it."""

    tracer: _Tracer

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # C code queries it too, for every argument of a torch function: only isinstance in traced code counts.
        if self.tracer.asking and not _is_fx(sys._getframe(1)):
            self.tracer.shadows.refuse("it asks for the type of a value")
        return type(self)

    def __getattr__(self, name: str) -> Any:
        return self.tracer.attribute(self, name)


class _Value(_ValueStandIn, torch.fx.Proxy):  # type: ignore[misc]
    """A proxy that distinguishes ``x += y`` from ``x + y``."""


class _Attribute(_ValueStandIn, Attribute):  # type: ignore[misc]
    pass


def _is_fx(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").startswith(("torch.fx", __package__))


_IN_PLACE = {f"__{name}__": getattr(operator, name) for name in ("iadd", "isub", "imul", "itruediv", "setitem")}
_OPERATORS = {
    f"__{name}__": getattr(operator, name)
    for name in (
        *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "getitem", "neg", "invert", "abs"),
        *("eq", "ne", "lt", "le", "gt", "ge", "xor", "lshift", "rshift"),
    )
} | {"__and__": operator.and_, "__or__": operator.or_}
# Special methods that need a value, which a placeholder does not have.
_VALUES = (
    "bool",
    "int",
    "float",
    "index",
    "complex",
    "len",
    "contains",
    "iter",
    "repr",
    "format",
    "str",
    "array",
    "reversed",
)
_NEEDS_VALUE = {f"__{name}__" for name in _VALUES} | {"item", "tolist", "numpy", "__deepcopy__", "__reduce_ex__"}


def _in_place(name: str) -> Any:
    def record(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", _IN_PLACE[name], (self, other), {})

    return record


for _name in _IN_PLACE.keys() - {"__setitem__"}:
    setattr(_ValueStandIn, _name, _in_place(_name))


def _flat(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        for v in value:
            yield from _flat(v)
    elif isinstance(value, dict):
        yield from _flat(tuple(value.values()))
    else:
        yield value


_NOT_USER_CODE = sys.stdlib_module_names - {"__main__"} | {"torch", "ctkernels"}


# ---- tracing -----------------------------------------------------------------------------------------------------------


class _Functions(TorchFunctionMode):
    """Records calls of torch functions in this thread instead of running them."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.tracer.function(func, args, kwargs or {})


class _Tracer(GraphAppendingTracer):
    def __init__(
        self,
        module: nn.Module,
        inline: Collection[nn.Module] | None,
        opaque: Collection[nn.Module],
        training: dict[nn.Module, bool],
    ) -> None:
        super().__init__(torch.fx.Graph())
        self.module, self.inline, self.opaque = module, inline, opaque
        self.scopes: dict[torch.fx.Node, tuple[nn.Module, ...]] = {}
        self.stand_ins, self.before = StandIns(), Namespaces(type(m) for m in module.modules())
        self.modes, self.asking, self.recording = _modes(), False, False
        self.stack: list[nn.Module] = []
        flags = {m: m.training for m in (module, *(inline or ()))} | training
        self.shadows = Shadows(module, self.held_tensor, self.call, flags)

    def run(self, kinds: Sequence[Kind]) -> Trace:
        names = list(inspect.signature(type(self.module).forward).parameters)[1:]
        args = [self.argument(name, kind) for name, kind in zip(names, kinds)]
        contents = [list(_flat(a)) for a in args]
        shadow, previous = self.shadows.root, sys.getprofile()
        self.stack = []
        try:
            sys.setprofile(self.profile)
            with _Functions(self):
                result = type(self.module).forward(shadow, *args)
        finally:
            sys.setprofile(previous)
        if any(list(map(id, _flat(a))) != list(map(id, g)) for a, g in zip(args, contents)):
            raise self.shadows.refuse("it writes to a list that it is given")
        self.create_node("output", "output", (self.create_arg(result),), {})
        if self.shadows.written():
            raise self.shadows.refuse("it keeps values from one call to the next")
        if self.shadows.refused:
            raise Untraceable(self.shadows.refused)
        reads = self.shadows.reads
        for node in list(self.graph.nodes):
            if node.op == "get_attr" and not node.users:
                self.graph.erase_node(node)
            elif node.op == "call_module":
                reads.path(self.module, node.target)
                self.skip_identity(node)
            elif node.op == "get_attr":
                reads.path(self.module, node.target.rpartition(".")[0])
        return Trace(self.graph, self.scopes, reads)

    def skip_identity(self, node: torch.fx.Node) -> None:
        """Removes calls of ``nn.Identity``."""
        module = self.module.get_submodule(str(node.target))
        identity = type(module).forward is nn.Identity.forward and "forward" not in vars(module) and is_open(module)
        if identity and len(node.args) == 1 and not node.kwargs:
            self.shadows.reads.of(module)
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            self.graph.erase_node(node)

    def close(self) -> None:
        self.shadows.close()

    def profile(self, frame: FrameType, event: str, arg: Any) -> None:
        """The thread's profile function while the forward runs."""
        if self.recording:
            return
        if event == "c_call":
            self.asking = arg is builtins.isinstance
        elif event in ("c_return", "c_exception"):
            self.asking = False
        elif event == "call":
            where, code = frame.f_globals.get("__name__", ""), frame.f_code
            if where == "torch.autograd.function" and code.co_name == "apply":
                self.shadows.refuse("it calls an autograd function of its own")
            elif where == "torch.utils.checkpoint":
                self.shadows.refuse("it is computed anew in the backward pass (torch.utils.checkpoint)")
            elif where.partition(".")[0] not in _NOT_USER_CODE:
                self.before.save_globals(frame.f_globals)
                if _asks_for_a_type(code):
                    self.shadows.refuse("it asks for the type of a value")

    # -- modules

    def call(self, module: nn.Module, shadow: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.is_leaf(module):
            return self.create_proxy("call_module", self.shadows.names[module], args, kwargs)
        self.shadows.reads.of(module)
        self.stack.append(module)
        result = type(module).forward(shadow, *args, **kwargs)
        self.stack.pop()  # not on an error: the stack then says where it occurred
        return result

    def is_leaf(self, module: nn.Module) -> bool:
        if module in self.opaque or not is_open(module) or hasattr(type(module), "ctu_arguments"):
            return True
        if self.inline is not None:
            return module not in self.inline
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # ``layers`` traces subclasses separately
            return True
        from_torch = type(module).__module__.startswith(("torch.nn", "torch.ao.nn"))
        return from_torch and not isinstance(module, nn.Sequential)

    # -- values

    def watch(self, stand_in: Any) -> None:
        self.stand_ins.watch(stand_in, type(self.stack[-1] if self.stack else self.module).__name__)

    def argument(self, name: str, kind: Kind) -> Any:
        if kind == "tensor":
            stand_in = _TensorStandIn.make(self, "placeholder", name)
            stand_in.recorded()
            return stand_in
        return self.sequence(self.create_proxy("placeholder", name, (), {}), kind)

    def sequence(self, proxy: Any, kind: Kind) -> Any:
        assert isinstance(kind, tuple)
        name, *kinds = kind
        values = []
        for i, inner in enumerate(kinds):
            if inner == "tensor":
                values.append(_TensorStandIn.make(self, "call_function", operator.getitem, (proxy.node, i)))
            else:
                values.append(self.sequence(proxy[i], inner))
        return values if name == "list" else tuple(values)

    def held_tensor(self, path: str, is_parameter: bool) -> _TensorStandIn:
        return _TensorStandIn.make(self, "get_attr", path, is_parameter=is_parameter)

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        proxy = _Value(node, self)
        self.watch(proxy)
        return proxy

    def attribute(self, root: Any, name: str) -> Any:
        proxy = _Attribute(root, name)
        self.watch(proxy)
        return proxy

    # -- operations

    def function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Records a call of a torch function, or of a method or property of tensors."""
        self.recording = True
        try:
            return self.record(func, args, kwargs)
        finally:
            self.recording = False

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self.create_proxy("call_function", getattr, (args[0], func.__self__.__name__), {})
        if name in ("__set__", "__delete__"):
            raise self.shadows.refuse("it writes to an attribute of a tensor")
        if func is torch._C._set_grad_enabled:
            raise self.shadows.refuse(_MODES)
        if name == "__hash__":
            return id(args[0])
        if not torch.overrides.is_tensor_method_or_property(func):
            if isinstance(func, torch._C.ScriptMethod):
                raise self.shadows.refuse("it calls a compiled method")
            return self.create_proxy("call_function", func, args, kwargs)
        if name in _NEEDS_VALUE:
            raise self.shadows.refuse("its path depends on a value")
        target = _IN_PLACE.get(name) or _OPERATORS.get(name)
        if target is not None:
            return self.create_proxy("call_function", target, args, kwargs)
        return self.create_proxy("call_method", name, args, kwargs)

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: str | None = None, type_expr: Any | None = None
    ) -> torch.fx.Node:
        if isinstance(target, SteeredCall):
            target = SteeredCall(self.shadows.original(target.owner), target.key, target.name, target.function)
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if _modes() != self.modes:
            raise self.shadows.refuse(_MODES)
        self.scopes[node] = tuple(self.stack)
        node.meta["line"] = _line()
        return node

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, _TensorStandIn) and type(a) is _TensorStandIn:
            return a.recorded()
        if isinstance(a, (list, dict)) and type(a) not in (list, dict) and not isinstance(a, immutable_list):
            raise self.shadows.refuse(f"it makes a {type(a).__name__}")
        if isinstance(a, Tensor):
            raise self.shadows.refuse("it uses a tensor that is no part of it")
        return super().create_arg(a)


_MODES = "it changes the gradient or autocast mode on its way"


def _modes() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def _line() -> tuple[str, int] | None:
    """(file, line) of the code that is run: the first frame that is neither torch's nor ours."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        where = frame.f_globals.get("__name__", "")
        if where == __name__ and frame.f_code.co_name == "run":
            return None
        if where.partition(".")[0] not in _NOT_USER_CODE:
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return None


@functools.lru_cache(maxsize=4096)
def _asks_for_a_type(code: CodeType) -> bool:
    """True if it calls ``type`` or reads ``__class__``, to which a stand-in and a tensor answer differently."""
    names = set(code.co_names)
    if "type" not in names and "__class__" not in names:
        return False
    return any(
        (i.argval == "type" and i.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
        or (i.argval == "__class__" and "ATTR" in i.opname)
        for i in dis.get_instructions(code)
    )


def argument_count(module: nn.Module) -> int | None:
    """The number of arguments of ``module``'s forward; None if some are optional: those choose between paths."""
    try:
        _, *parameters = inspect.signature(type(module).forward).parameters.values()
    except (TypeError, ValueError):
        return None
    plain = all(p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty for p in parameters)
    return len(parameters) if plain and parameters else None
