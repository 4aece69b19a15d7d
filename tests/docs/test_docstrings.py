"""Every example in a docstring runs as it is written, and prints what it says."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from namespaces import namespace

ROOT = Path(__file__).parents[2]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

# Examples that are shown and not run, with the reason.
SKIPPED = {
    "ctkernels/lab/executor.py:RayExecutor": "starts a cluster; tests/lab/test_ray.py does",
    "ctkernels/adapters/serving/gguf.py:save_gguf": "a GGUF file of the base model (tests/adapters/test_serving_llama_cpp.py)",
    "examples/serve_adapters.py:AdapterBatching": "threads of a server; tests/examples/test_serve_adapters.py runs it",
    "examples/data/images.py:fashion_mnist": "60,000 images that a Debian package or a download has to bring",
    "examples/data/texts.py:wordnet": "WordNet, which a package has to bring",
    "examples/data/texts.py:hypernyms": "WordNet, which a package has to bring",
}


class Documented(NamedTuple):
    """Something with an example in its docstring."""

    path: str
    name: str
    line: int
    docstring: str

    @property
    def id(self):
        return f"{self.path}:{self.name}"


def documented():
    for file in sorted(path for folder in ("ctkernels", "examples") for path in (ROOT / folder).rglob("*.py")):
        path = file.relative_to(ROOT).as_posix()
        for name, node in _definitions(ast.parse(file.read_text()), ""):
            docstring = ast.get_docstring(node) or ""
            if ">>>" in docstring or re.search(r"^ *Examples?::?$", docstring, re.M):
                yield Documented(path, name, node.body[0].lineno, docstring)


def _definitions(node, name):
    """Modules, classes and functions, with their names in the module."""
    if isinstance(node, ast.Module):
        yield name, node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            inner = f"{name}.{child.name}".lstrip(".")
            yield inner, child
            yield from _definitions(child, inner)


DOCUMENTED = list(documented())


def _doctest(item, names):
    return doctest.DocTestParser().get_doctest(item.docstring, names, item.name, str(ROOT / item.path), item.line)


def _skipped(test):
    return any(example.options.get(doctest.SKIP) for example in test.examples)


def _exported(item):
    """What one imports to use it: the thing itself, and the public names of the packages that it is in."""
    module = item.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    names: dict[str, Any] = {}
    packages = [module.rsplit(".", depth)[0] for depth in range(module.count("."))]
    for package in reversed(packages):
        loaded = importlib.import_module(package)
        names |= {name: getattr(loaded, name) for name in getattr(loaded, "__all__", ())}
    top = item.name.partition(".")[0]
    return {**names, top: getattr(importlib.import_module(module), top)}


def test_the_collection_finds_them():
    assert len(DOCUMENTED) >= 75
    assert {"ctkernels/nn.py:CTU", "ctkernels/ops/explain.py:explain"} <= {item.id for item in DOCUMENTED}


@pytest.mark.parametrize("item", DOCUMENTED, ids=lambda item: item.id)
def test_examples_stand_where_the_documentation_finds_them(item):
    """In a section `Examples:` at the end or before another heading, as doctests; else the pages show them as prose."""
    sections = re.findall(r"^Examples:\n((?:    .*\n?)+)", item.docstring, re.M)
    assert len(sections) == 1, "expected one section 'Examples:'"
    assert item.docstring.count(">>> ") == sections[0].count("    >>> ") > 0


@pytest.mark.parametrize("item", DOCUMENTED, ids=lambda item: item.id)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_example_runs(item, tmp_path, monkeypatch):
    if item.id in SKIPPED:
        assert _skipped(_doctest(item, {})), "runs: take it out of SKIPPED"
        pytest.skip(SKIPPED[item.id])
    monkeypatch.chdir(tmp_path)
    names = namespace(item.path)
    test = _doctest(item, {**_exported(item), **names})
    assert not _skipped(test), "a skipped example needs a reason in SKIPPED"
    report: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.append)
    assert not report, "".join(report)


def test_no_reason_is_left_over():
    assert set(SKIPPED) <= {item.id for item in DOCUMENTED}
