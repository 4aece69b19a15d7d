"""A kernel ready to run: the decoded instructions of it and of what it calls, and where its variables live."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .decode import Collective, Control, Step, decode
from .errors import Unsupported
from .memory import Memory
from .parser import Function, Module, Variable


class Symbol(NamedTuple):
    """A named piece of memory. Global and const ones have host addresses, the others offsets in their space."""

    space: str
    address: int
    size: int


@dataclass
class Op:
    """One decoded instruction."""

    text: str
    line: str
    guard: tuple[int, bool] | None
    step: Step | None = None
    control: Control | None = None
    collective: Collective | None = None
    results: list[tuple[int, int, int]] = field(default_factory=list)  # of a call: (to, from, size) in the frame


@dataclass
class Program:
    """A kernel of a module, decoded. Public: `name`, `params`, `shared`, `max_threads`."""

    module: Module
    name: str
    code: list[Op] = field(default_factory=list)
    start: int = 0
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    register_index: dict[str, int] = field(default_factory=dict)
    register_size: list[int] = field(default_factory=list)
    shared: int = 0  # bytes of static shared memory
    local: int = 0  # bytes of local memory a thread, call parameters included
    param_bytes: int = 0
    granule: int = 4  # race detection looks at cells this wide: the narrowest access of the kernel
    between_blocks: bool = False  # whether blocks may order each other (fences, release/acquire)
    storage: dict[str, tuple[np.ndarray, Variable]] = field(default_factory=dict)  # module variables, shareable

    def __post_init__(self) -> None:
        self._symbols: dict[str, Symbol] = {}
        self._variables: dict[str, Variable] = dict(self.module.variables)
        self.entry = self.module.functions[self.name]
        self.dynamic: list[str] = []
        self.starts: dict[str, int] = {}
        self.params: list[tuple[Variable, int]] = []
        for variable in self.entry.params:
            self.param_bytes = -(-self.param_bytes // variable.align) * variable.align
            self.params.append((variable, self.param_bytes))
            self._symbols[variable.name] = Symbol("param", self.param_bytes, variable.size)
            self.param_bytes += variable.size
        for function in self._reachable():
            self._decode(function)
        self.dynamic_align = max([16, *(self._variables[n].align for n in self.dynamic)])
        if self.dynamic:
            self._place_dynamic()

    # -- what launches need

    @property
    def max_threads(self) -> int:
        """The largest block the kernel was compiled for."""
        return self.entry.max_threads or 1024

    def hosted(self, memory: Memory) -> None:
        """Registers the module's global and constant variables."""
        for array, variable in self.storage.values():
            memory.register(array, readonly=variable.space == "const", name=variable.name)

    def variable(self, name: str) -> np.ndarray:
        """The bytes of a module variable, to read results from or to fill in."""
        self.symbol(name)
        return self.storage[name][0]

    # -- what decoding needs

    def has_symbol(self, name: str) -> bool:
        """Whether a name is a variable or parameter."""
        return name in self._symbols or name in self._variables

    def symbol(self, name: str) -> Symbol:
        """Where a variable lives; gives it a place on first use."""
        if name not in self._symbols:
            self._symbols[name] = self._place(self._variables[name])
        return self._symbols[name]

    def access(self, size: int) -> None:
        """Notes the width of a memory access."""
        self.granule = min(self.granule, size)

    def target(self, label: str, scopes: tuple[str, ...]) -> int:
        """The position of a label seen from a scope."""
        for prefix in scopes:
            if prefix + label in self.labels:
                return self.labels[prefix + label]
        raise Unsupported(f"label {label}")

    def table(self, label: str, scopes: tuple[str, ...]) -> list[int]:
        """The targets of a .branchtargets list."""
        for prefix in scopes:
            if prefix + label in self.tables:
                return [self.target(t, scopes) for t in self.tables[prefix + label]]
        raise Unsupported(f"branch targets {label}")

    def function(self, name: str) -> Function:
        """A device function of the module."""
        if name not in self.module.functions:
            raise Unsupported(f"call of {name}")
        return self.module.functions[name]

    # -- construction

    def _place(self, variable: Variable) -> Symbol:
        if variable.space == "shared":
            if variable.size == 0:
                self.dynamic.append(variable.name)
                return Symbol("shared", 0, 0)  # moved behind the static variables once those are known
            self.shared = -(-self.shared // variable.align) * variable.align
            self.shared += variable.size
            return Symbol("shared", self.shared - variable.size, variable.size)
        if variable.space in ("local", "param"):
            self.local = -(-self.local // max(variable.align, 8)) * max(variable.align, 8)
            self.local += variable.size
            return Symbol("local", self.local - variable.size, variable.size)
        if variable.size == 0:
            raise Unsupported(f"{variable.space} variable {variable.name} without a size")
        if variable.name in self.storage:
            return Symbol(variable.space, self.storage[variable.name][0].ctypes.data, variable.size)
        raw = np.zeros(variable.size + 256, np.uint8)
        skip = -raw.ctypes.data % 256
        array = raw[skip : skip + variable.size].view()
        if variable.data is not None:
            array[:] = np.frombuffer(variable.data, np.uint8)
        self.storage[variable.name] = array, variable
        self._symbols[variable.name] = Symbol(variable.space, array.ctypes.data, variable.size)
        for offset, name in variable.fixups:
            array[offset : offset + 8] = np.frombuffer(np.uint64(self.symbol(name).address).tobytes(), np.uint8)
        return self._symbols[variable.name]

    def _place_dynamic(self) -> None:
        # Addresses of dynamic shared memory are baked into closures, so they must be known first: decode once more.
        base = -(-self.shared // self.dynamic_align) * self.dynamic_align
        if base:
            for name in self.dynamic:
                self._symbols[name] = Symbol("shared", base, 0)
            self.code.clear()
            for function in self._reachable():
                self._decode(function)

    def _reachable(self) -> list[Function]:
        order: list[Function] = []
        active: list[str] = []

        def visit(function: Function) -> None:
            if function in order:
                return
            if function.name in active:
                raise Unsupported(f"recursion of {function.name}")
            active.append(function.name)
            for s in function.code:
                if s.opcode == "call":
                    name = s.operands[1 if s.operands[0].startswith("(") else 0]
                    callee = self.module.functions.get(name)
                    if callee is not None and not callee.declared:
                        visit(callee)
            active.pop()
            order.append(function)

        visit(self.entry)
        return order

    def _decode(self, function: Function) -> None:
        # Callees come first: the scheduler runs the lowest position, so calls finish before callers go on.
        base = self.starts[function.name] = len(self.code)
        if function is self.entry:
            self.start = base
        for variable in [*function.variables, *([] if function is self.entry else function.params + function.results)]:
            self._variables[variable.name] = variable
        self.labels.update({name: base + at for name, at in function.labels.items()})
        self.tables.update(function.tables)
        for name, size in function.registers.items():
            if name not in self.register_index:
                self.register_index[name] = len(self.register_size)
                self.register_size.append(size)
        for s in function.code:
            decoded = decode(s, self, function.name)
            guard = None
            if s.guard:
                index = self.register_index.get(s.guard[0])
                if index is None or self.register_size[index]:
                    raise Unsupported(f"{s.line}: guard {s.guard[0]} of {s.text}")
                guard = (index, s.guard[1])
            op = Op(s.text, s.line, guard)
            if isinstance(decoded, Control):
                op.control = decoded
            elif isinstance(decoded, Collective):
                op.collective = decoded
            else:
                op.step = decoded
            self.code.append(op)
        self.code.append(Op("ret", "?", None, control=_fall_off()))


def _fall_off() -> Control:
    from .control import leave

    return Control(leave)
