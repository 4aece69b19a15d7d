"""PTX text to data: kernels, device functions, parameters, registers, labels, source lines and module variables.

Nothing here knows what an instruction does. Names are made unique per function and per `{ }` scope, so that later
stages can treat a function body as one flat list.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .errors import Unsupported
from .values import TYPES

NAME = r"[%\w$.]+"
HEADER = re.compile(rf"\s*(?:\(([^)]*)\))?\s*({NAME})\s*(?:\(([^)]*)\))?\s*([^{{;]*)([{{;])")


@dataclass
class Variable:
    """A parameter or a variable: its size in bytes, alignment, and initial bytes if it has any.

    `fixups` lists (offset, symbol) of addresses stored in the initial bytes.
    """

    name: str
    space: str
    size: int
    align: int
    data: bytes | None = None
    fixups: list[tuple[int, str]] = field(default_factory=list)


@dataclass
class Statement:
    """One instruction as written: opcode with its modifiers, operand texts, guard (register, negated), source line."""

    opcode: str
    modifiers: list[str]
    operands: list[str]
    guard: tuple[str, bool] | None
    line: str
    text: str
    scopes: tuple[str, ...]  # name prefixes, innermost first, to find labels with


@dataclass
class Function:
    """A kernel (`entry`) or device function. `registers` maps unique names to sizes in bytes (0 for predicates)."""

    name: str
    entry: bool
    params: list[Variable]
    results: list[Variable]
    code: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    max_threads: int | None = None
    exact_block: tuple[int, ...] | None = None
    declared: bool = False  # a prototype without a body


@dataclass
class Module:
    """A PTX file: `target` such as 80, functions by name, module variables by name."""

    target: int
    functions: dict[str, Function]
    variables: dict[str, Variable]

    @property
    def entries(self) -> list[str]:
        """Names of the kernels, in order."""
        return [f.name for f in self.functions.values() if f.entry]


def split_operands(text: str) -> list[str]:
    """Split at commas outside brackets."""
    out, depth, current = [], 0, ""
    for ch in text:
        depth += (ch in "{[(") - (ch in "}])")
        if ch == "," and depth == 0:
            out.append(current.strip())
            current = ""
        else:
            current += ch
    return [*out, current.strip()] if current.strip() else out


def parse(ptx: str) -> Module:
    """Parse a whole PTX file."""
    source = re.sub(r"/\*.*?\*/", "", ptx, flags=re.S)
    source = re.sub(r"//[^\n]*", "", source)
    files = {n: path.rsplit("/", 1)[-1] for n, path in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', source)}
    source = re.sub(r"\.section\s+\S+\s*\{[^}]*\}", "", source)
    source = re.sub(r"\.file[^\n]*|\.section[^\n]*", "", source)
    target = re.search(r"\.target\s+sm_(\d+)", source)
    module = Module(int(target[1]) if target else 0, {}, {})
    if re.search(r"\.address_size\s+32", source):
        raise Unsupported("32-bit addresses")
    position = 0
    pattern = re.compile(
        r"(?P<function>(?:\.(?:visible|weak|extern)\s+)*\.(?:entry|func)\b)|"
        r"(?P<variable>(?:\.(?:visible|weak|extern|common)\s+)*\.(?:global|const|shared)\b[^;]*;)|"
        r"(?P<other>\.(?:tex|surf|sampler)\w*\b|\.alias\b)"
    )
    while found := pattern.search(source, position):
        if found["other"]:
            raise Unsupported(f"module directive {found['other']}")
        if found["variable"]:
            variable = parse_variable(found["variable"][:-1])
            module.variables[variable.name] = variable
            position = found.end()
        else:
            position = _parse_function(source, found, files, module)
    return module


def parse_variable(text: str, scope: str = "") -> Variable:
    """A declaration such as `.shared .align 16 .b8 name[64]` or `.global .u32 t[2] = {1, 2}`."""
    text = re.sub(r"\.(?:visible|weak|extern|common)\s+|\.attribute\s*\([^)]*\)", "", text).strip()
    head, _, initial = text.partition("=")
    space = re.match(r"\.(global|const|shared|local|param)\b", head)
    if not space:
        raise Unsupported(f"declaration {text!r}")
    rest = head[space.end() :]
    rest = re.sub(r"\.ptr(\s+\.(global|shared|const|local))?", "", rest)
    align = re.search(r"\.align\s+(\d+)", rest)
    rest = re.sub(r"\.align\s+\d+", "", rest)
    vector = re.search(r"\.v([248])\b", rest)
    rest = re.sub(r"\.v[248]\b", "", rest)
    m = re.match(rf"\s*\.(\w+)\s+({NAME})\s*((?:\[[^\]]*\]\s*)*)$", rest.strip() if rest.strip()[0] == "." else rest)
    if not m or m[1] not in TYPES or m[1] == "pred":
        raise Unsupported(f"declaration {text!r}")
    element = TYPES[m[1]].size
    count = int(vector[1]) if vector else 1
    for dimension in re.findall(r"\[\s*(\d*)\s*\]", m[3]):
        count *= int(dimension or 0)
    natural = element * int(vector[1]) if vector else element
    out = Variable(scope + m[2], space[1], element * count, int(align[1]) if align else natural)
    if initial.strip():
        out.data = _initial_bytes(initial, m[1], out)
    return out


def _initial_bytes(initial: str, type_name: str, variable: Variable) -> bytes:
    from .decode import literal_bytes

    size, data = TYPES[type_name].size, b""
    flat = [x.strip() for x in re.sub(r"[{}]", " ", initial).split(",") if x.strip()]
    for item in flat:
        symbol = re.match(r"^(?:generic\s*\(\s*)?([A-Za-z_$][\w$]*)\s*\)?$", item)
        if symbol and not re.match(r"^0[fFdDxX]", item):
            variable.fixups.append((len(data), symbol[1]))
            data += bytes(size)
        elif re.match(r"^[\w.+-]+$", item):
            data += literal_bytes(item, type_name)
        else:
            raise Unsupported(f"initialiser {item!r} of {variable.name}")
    return data.ljust(variable.size, b"\0")


def _matching(source: str, start: int, opening: str, closing: str) -> int:
    depth, i = 1, start
    for m in re.compile(f"[{re.escape(opening + closing)}]").finditer(source, start):
        depth += 1 if m[0] == opening else -1
        i = m.end()
        if depth == 0:
            return i
    raise Unsupported(f"unbalanced {opening!r}")


def _parse_function(source: str, found: re.Match, files: dict[str, str], module: Module) -> int:
    entry = ".entry" in found[0]
    header = HEADER.match(source, found.end())
    if not header:
        raise Unsupported(f"function header near {source[found.end() : found.end() + 60]!r}")
    name, directives, position = header[2], header[4], header.end()
    if ".reg" in (header[1] or "") + (header[3] or ""):
        raise Unsupported(f"function {name} with register parameters")
    scope = "" if entry else name + "::"
    make = [[parse_variable(p, scope) for p in split_operands(g or "")] for g in (header[3], header[1])]
    function = Function(name, entry, make[0], make[1])
    if m := re.search(r"\.reqntid\s+([\d,\s]+)", directives):
        function.exact_block = tuple(int(v) for v in m[1].split(","))
    if m := re.search(r"\.maxntid\s+([\d,\s]+)", directives):
        function.max_threads = 1
        for v in m[1].split(","):
            function.max_threads *= int(v)
    if ".explicitcluster" in directives or re.search(r"\.reqnctapercluster\s+([2-9]|1\d)", directives):
        raise Unsupported(f"clusters in {name}")
    if header[5] == ";":
        function.declared = True
        module.functions.setdefault(name, function)
        return position
    end = _matching(source, position, "{", "}")
    _Body(function, files, scope).parse(source[position : end - 1])
    module.functions[name] = function
    return end


class _Body:
    """Splits a function body into statements, keeping `{ }` scopes apart from `{ }` operands."""

    def __init__(self, function: Function, files: dict[str, str], prefix: str):
        self.function, self.files, self.prefix = function, files, prefix
        self.line = "?"
        names = {v.name.removeprefix(prefix): v.name for v in function.params + function.results}
        self.scopes: list[tuple[str, dict[str, str], set[str]]] = [(prefix, names, set())]
        self.count = 0

    def parse(self, body: str) -> None:
        statement, depth = "", 0
        for piece in re.split(r"([;{}]|\.loc\b[^\n]*)", body):
            if piece.startswith(".loc") and not self._labels(statement).strip():
                statement = ""
                self._location(piece)
            elif piece == "{" and not self._labels(statement).strip():
                statement = ""
                self.count += 1
                self.scopes.append((f"{self.prefix}{self.count}:", {}, set()))
            elif piece == "}" and depth == 0:
                if statement.strip():
                    raise Unsupported(f"statement {statement.strip()!r}")
                self.scopes.pop()
                statement = ""
            elif piece == ";" and depth == 0:
                self._statement(self._labels(statement).strip())
                statement = ""
            else:
                depth += (piece == "{") - (piece == "}")
                statement += piece
        if self._labels(statement).strip():
            raise Unsupported(f"statement {statement.strip()!r}")

    def _location(self, text: str) -> None:
        m = re.match(r"\.loc\s+(\d+)\s+(\d+)", text)
        if m:
            self.line = f"{self.files.get(m[1], m[1])}:{m[2]}"

    def _labels(self, statement: str) -> str:
        """Records leading labels (once) and returns the rest."""
        while m := re.match(r"\s*([\w$]+):(?!:)\s*", statement):
            if m[1] not in self.scopes[-1][2]:
                self.scopes[-1][2].add(m[1])
                self.function.labels[self.scopes[-1][0] + m[1]] = len(self.function.code)
            self.last_label = self.scopes[-1][0] + m[1]
            statement = statement[m.end() :]
        return statement

    def _statement(self, text: str) -> None:
        if not text:
            return
        if text.startswith(".reg"):
            return self._registers(text)
        if text.startswith(".branchtargets"):
            targets = split_operands(text.removeprefix(".branchtargets"))
            self.function.tables[self.last_label] = targets
            return None
        if text.startswith(".pragma"):
            return None
        if re.match(r"\.(shared|local|param|global|const|weak|visible)\b", text):
            prefix = self.scopes[-1][0]
            variable = parse_variable(text, prefix)
            self.scopes[-1][1][variable.name.removeprefix(prefix)] = variable.name
            self.function.variables.append(variable)
            return None
        if text.startswith("."):
            raise Unsupported(f"directive {text!r}")
        guard = None
        if m := re.match(r"@\s*(!?)\s*(%?[\w$]+)\s+(.*)", text, re.S):
            guard, text = (self._resolve(m[2]), m[1] == "!"), m[3]
        m = re.match(r"([^\s{\[(]+)\s*(.*)", text, re.S)
        if not m:
            raise Unsupported(f"statement {text!r}")
        opcode, *modifiers = m[1].split(".")
        operands = [re.sub(r"(?<![\w$])[%A-Za-z_$][\w$]*(?:\.[xyz])?", self._name, o) for o in split_operands(m[2])]
        scopes = tuple(s[0] for s in reversed(self.scopes))
        text = " ".join(f"{m[1]} {m[2]}".split())
        self.function.code.append(Statement(opcode, modifiers, operands, guard, self.line, text, scopes))
        return None

    def _registers(self, text: str) -> None:
        m = re.match(r"\.reg\s+(\.v[24]\s+)?\.(\w+)\s+(.*)", text, re.S)
        if not m or m[1] or (m[2] not in TYPES and m[2] != "b128"):
            raise Unsupported(f"registers {text!r}")
        prefix, names, _ = self.scopes[-1]
        size = 16 if m[2] == "b128" else TYPES[m[2]].size
        for item in split_operands(m[3]):
            many = re.match(r"(.*)<(\d+)>$", item)
            for name in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [item]:
                names[name] = prefix + name
                self.function.registers[prefix + name] = size

    def _resolve(self, name: str) -> str:
        for _, names, _labels in reversed(self.scopes):
            if name in names:
                return names[name]
        return name

    def _name(self, m: re.Match) -> str:
        return self._resolve(m[0])
