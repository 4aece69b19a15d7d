"""Traces a module's forward into a ``torch.fx`` graph; refuses whenever the graph might differ from the module.

The forward is run once, on shadows of the modules (``shadow``) and with stand-ins for the tensors, and what it does to them
is written down as a ``torch.fx`` graph. Nothing is replaced anywhere: the calls of modules are seen by the shadows, those of
torch's functions by a ``TorchFunctionMode``, which like ``sys.setprofile`` is of this thread alone.

Some things that a path may depend on, or do beside its result, do not show in a graph. They are noticed while it runs, and
the module is then left alone.
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

# What an argument is: "tensor", or ("list", *kinds) and ("tuple", *kinds).
Kind = str | tuple[Any, ...]
_SEQUENCES: dict[type, str] = {list: "list", tuple: "tuple"}


def kind_of(value: Any) -> Kind | None:
    """The kind of an argument, None where there is none: then the original forward runs."""
    if type(value) is Tensor or type(value) is nn.Parameter:
        return "tensor"
    name = _SEQUENCES.get(type(value))
    if name is None:
        return None
    kinds = [kind_of(v) for v in value]
    return None if None in kinds else (name, *kinds)


class Trace(NamedTuple):
    """scopes: {node: the modules whose forward it stands in, outermost first}. reads: what the path depends on."""

    graph: torch.fx.Graph
    scopes: dict[torch.fx.Node, tuple[nn.Module, ...]]
    reads: Reads


_TRIES = 8


def trace(
    module: nn.Module,
    inline: Collection[nn.Module] | None,
    kinds: Sequence[Kind],
    training: dict[nn.Module, bool],
    closed: set[nn.Module] | None = None,
) -> Trace:
    """The graph of ``module``'s forward.

    Args:
        inline: the modules below it that are looked into. None: all that can be, but for layers of torch.
        kinds: what the arguments are.
        training: the flags to read it with, {module: flag}; other modules have their own.
        closed: with ``inline`` None, modules that are known not to be readable. What is found out is added.

    Raises:
        Untraceable: it cannot be read. RuntimeError: it has put stand-ins where they cannot be taken back from.
    """
    closed = set() if closed is None else closed
    for tries_left in reversed(range(_TRIES)):
        tracer = _Tracer(module, inline, closed, training)
        try:
            return _checked(tracer, kinds)
        except Untraceable:
            if inline is not None or not tracer.stack or not tries_left:
                raise
            closed.add(tracer.stack[-1])  # a part that cannot be read: called, and not looked into
    raise AssertionError("the last try returns or raises")


def _checked(tracer: _Tracer, kinds: Sequence[Kind]) -> Trace:
    """Run the forward, then make sure that it left nothing behind."""
    state = random.getstate()
    reason, read = "", None
    try:
        read = tracer.run(kinds)
    except Exception as error:  # any code may run here, and any error means that it cannot be read this way
        said = str(error) if isinstance(error, Untraceable) else f"it cannot be read: {_first_line(error)}"
        reason = tracer.shadows.refused or said
        _let_go(error)
    if random.getstate() != state:
        random.setstate(state)
        reason = reason or "it draws random numbers"
    stand_ins = tracer.stand_ins
    tracer.close()
    if stand_ins.any_alive():
        stand_ins.take_back(tracer.before)
        reason = "it keeps values, outside of the module, from one call to the next"
    if reason or read is None:
        raise Untraceable(reason)
    return read


def _let_go(error: BaseException | None) -> None:
    """Drop the references that an error's frames hold, to stand-ins among others."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- stand-ins ---------------------------------------------------------------------------------------------------------


class _Known(Tensor, StandIn):
    """Stands for what is a tensor for certain: an argument, a parameter, a buffer. It is one, without a value."""

    @staticmethod
    def make(tracer: _Tracer, op: str, target: Any, args: tuple[Any, ...] = (), is_parameter: bool = False) -> _Known:
        with torch._C.DisableTorchFunction():
            stand_in: Any = Tensor._make_subclass(_Known, torch.empty(0, device="meta"))
        stand_in.tracer, stand_in.creation, stand_in.node = tracer, (op, target, args), None
        if is_parameter:
            stand_in._is_param = True
        tracer.watch(stand_in)
        return stand_in

    tracer: _Tracer
    creation: tuple[str, Any, tuple[Any, ...]]
    node: torch.fx.Node | None

    def recorded(self) -> torch.fx.Node:
        """Its node, made when it is first asked for."""
        if self.node is None:
            op, target, args = self.creation
            self.node = self.tracer.create_node(op, target, args, {})
        return self.node

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        stand_in = next(a for a in _flat((args, kwargs)) if isinstance(a, _Known))
        return stand_in.tracer.function(func, args, kwargs or {})


def is_stand_in(value: Any) -> bool:
    return isinstance(value, (_Known, _Noticing))


class _Noticing:
    """Mixin of stand-ins for values of any type: notices who asks for the type, and so may choose a path by it."""

    tracer: _Tracer

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # Asked by C code, too, whenever a function of torch gets one: which is no question of the forward's.
        if self.tracer.asking and not _is_fx(sys._getframe(1)):
            self.tracer.shadows.refuse("it asks for the type of a value")
        return type(self)

    def __getattr__(self, name: str) -> Any:
        return self.tracer.attribute(self, name)


class _Value(_Noticing, torch.fx.Proxy):  # type: ignore[misc]
    """A proxy that knows ``x += y`` from ``x + y``."""


class _Attribute(_Noticing, Attribute):  # type: ignore[misc]
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
# Of these Python wants a value, which a stand-in does not have.
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
_ASKS_FOR_A_VALUE = {f"__{name}__" for name in _VALUES} | {"item", "tolist", "numpy", "__deepcopy__", "__reduce_ex__"}


def _in_place(name: str) -> Any:
    def record(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", _IN_PLACE[name], (self, other), {})

    return record


for _name in _IN_PLACE.keys() - {"__setitem__"}:
    setattr(_Noticing, _name, _in_place(_name))


def _flat(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        for v in value:
            yield from _flat(v)
    elif isinstance(value, dict):
        yield from _flat(tuple(value.values()))
    else:
        yield value


_NOT_THE_USERS = sys.stdlib_module_names - {"__main__"} | {"torch", "ctkernels"}


# ---- running it --------------------------------------------------------------------------------------------------------


class _Functions(TorchFunctionMode):
    """Hears of every function of torch that this thread calls, and writes it down instead."""

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
        closed: Collection[nn.Module],
        training: dict[nn.Module, bool],
    ) -> None:
        super().__init__(torch.fx.Graph())
        self.module, self.inline, self.closed = module, inline, closed
        self.scopes: dict[torch.fx.Node, tuple[nn.Module, ...]] = {}
        self.stand_ins, self.before = StandIns(), Namespaces(type(m) for m in module.modules())
        self.modes, self.asking, self.writing = _modes(), False, False
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
        """Placeholders for layers that a configuration leaves out."""
        held = self.module.get_submodule(str(node.target))
        ordinary = type(held).forward is nn.Identity.forward and "forward" not in vars(held) and is_open(held)
        if ordinary and len(node.args) == 1 and not node.kwargs:
            self.shadows.reads.of(held)
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            self.graph.erase_node(node)

    def close(self) -> None:
        self.shadows.close()

    def profile(self, frame: FrameType, event: str, arg: Any) -> None:
        """Profile function of the thread while the forward runs."""
        if self.writing:
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
            elif where.partition(".")[0] not in _NOT_THE_USERS:
                self.before.note_globals(frame.f_globals)
                if _asks_for_a_type(code):
                    self.shadows.refuse("it asks for the type of a value")

    # -- modules

    def call(self, module: nn.Module, shadow: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.is_leaf(module):
            return self.create_proxy("call_module", self.shadows.names[module], args, kwargs)
        self.shadows.reads.of(module)
        self.stack.append(module)
        result = type(module).forward(shadow, *args, **kwargs)
        self.stack.pop()  # an error leaves it, which says where it happened
        return result

    def is_leaf(self, module: nn.Module) -> bool:
        if module in self.closed or not is_open(module) or hasattr(type(module), "ctu_arguments"):
            return True
        if self.inline is not None:
            return module not in self.inline
        if isinstance(
            module, nn.modules.batchnorm._BatchNorm
        ):  # one with code of its own is read by itself, in ``layers``
            return True
        torchs = type(module).__module__.startswith(("torch.nn", "torch.ao.nn"))
        return torchs and not isinstance(module, nn.Sequential)

    # -- values

    def watch(self, stand_in: Any) -> None:
        self.stand_ins.watch(stand_in, type(self.stack[-1] if self.stack else self.module).__name__)

    def argument(self, name: str, kind: Kind) -> Any:
        if kind == "tensor":
            stand_in = _Known.make(self, "placeholder", name)
            stand_in.recorded()
            return stand_in
        return self.sequence(self.create_proxy("placeholder", name, (), {}), kind)

    def sequence(self, held: Any, kind: Kind) -> Any:
        assert isinstance(kind, tuple)
        name, *kinds = kind
        values = []
        for i, inner in enumerate(kinds):
            if inner == "tensor":
                values.append(_Known.make(self, "call_function", operator.getitem, (held.node, i)))
            else:
                values.append(self.sequence(held[i], inner))
        return values if name == "list" else tuple(values)

    def held_tensor(self, path: str, is_parameter: bool) -> _Known:
        return _Known.make(self, "get_attr", path, is_parameter=is_parameter)

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        proxy = _Value(node, self)
        self.watch(proxy)
        return proxy

    def attribute(self, root: Any, name: str) -> Any:
        proxy = _Attribute(root, name)
        self.watch(proxy)
        return proxy

    # -- what is done to them

    def function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Write down the call of a function of torch, of a method or a property of tensors."""
        self.writing = True
        try:
            return self.record(func, args, kwargs)
        finally:
            self.writing = False

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
        if name in _ASKS_FOR_A_VALUE:
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
        if isinstance(a, _Known) and type(a) is _Known:
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
        if where.partition(".")[0] not in _NOT_THE_USERS:
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
