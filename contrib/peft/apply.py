"""Lays JoLA over a source tree of peft: ``python contrib/peft/apply.py PATH_TO_PEFT``.

New files are copied; the entries that a method needs in peft's own files (its type, its default targets, the rows of the tests)
are inserted beside those of (IA)3. Running it again changes nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path


HERE = Path(__file__).resolve().parent

# model types by the names of their attentions' output projections
TARGETS = {
    "o_proj": "llama mistral mixtral qwen2 qwen3 gemma gemma2 gemma3_text phi3 cohere olmo2 granite",
    "out_proj": "opt bart gptj gpt_neo codegen",
    "self_attn.dense": "phi",
    "attention.dense": "gpt_neox",
    "self_attention.dense": "falcon bloom",
    "attention.output.dense": "bert roberta xlm-roberta electra deberta deberta-v2",
    "attn.c_proj": "gpt2 gpt_bigcode",
}
T5 = '["SelfAttention.o", "EncDecAttention.o"]'

SOFT = """\
# Gates that are hardly ever clipped get a gradient in every step, which the tests expect of parameters.
JOLA_SOFT_GATES = {"temperature": 5.0, "stretch": (-1e-4, 1.0001)}

"""
CUSTOM = """\
    ########
    # JoLA #
    ########
    ("Vanilla MLP 1 JoLA", "MLP", JolaConfig, {"target_modules": "lin0", "head_dim": 5, **JOLA_SOFT_GATES}),
    ("Vanilla MLP 2 JoLA", "MLP", JolaConfig, {"target_modules": ["lin0"], "head_dim": 5, **JOLA_SOFT_GATES}),
    ("Vanilla MLP 3 JoLA", "MLP", JolaConfig, {"target_modules": ["lin1"], "head_dim": 4, **JOLA_SOFT_GATES}),
    ("Vanilla MLP 4 JoLA", "MLP", JolaConfig, {"target_modules": ["lin0", "lin1"], "head_dim": 5, **JOLA_SOFT_GATES}),
    (
        "Vanilla MLP 5 JoLA",
        "MLP",
        JolaConfig,
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "head_dim": 5, **JOLA_SOFT_GATES},
    ),
    (
        "Vanilla MLP 6 JoLA",
        "MLP",
        JolaConfig,
        {"target_modules": ["lin0"], "head_dim": 5, "edit": "multiplicative", **JOLA_SOFT_GATES},
    ),
    (
        "Vanilla MLP 7 JoLA",
        "MLP",
        JolaConfig,
        {"target_modules": ["lin0"], "head_dim": 5, "edit": "additive", **JOLA_SOFT_GATES},
    ),
"""


def _pair(name: str, first: str, second: str) -> str:
    rows = [f'{{"target_modules": ["{target}"], "head_dim": 5, "init_weights": False}}' for target in (first, second)]
    return f'    (\n        "{name}",\n        "jola",\n        JolaConfig,\n        {rows[0]},\n        {rows[1]},\n    ),\n'


SEVERAL = _pair("JoLA Same", "lin0", "lin0") + _pair("JoLA Different", "lin0", "lin1")
MIXED = """\
    (
        "JoLA",
        JolaConfig(target_modules=["lin0"], head_dim=5, init_weights=False),
        JolaConfig(target_modules=["lin0"], head_dim=5, init_weights=False),
    ),
"""
# The transformers models have heads of their own, so none is given here.
ROWS = "".join(
    "    (\n        JolaConfig,\n"
    f'        {{{{"task_type": "{{task}}", "target_modules": None, "edit": "{edit}", **JOLA_SOFT_GATES}}}},\n    ),\n'
    for edit in ("both", "multiplicative")
)
CHECK = """\
def check_jola_config(config_cls, model_id, config_kwargs):
    if config_cls != JolaConfig or config_kwargs["edit"] == "multiplicative":
        return
    if any(name in model_id.lower() for name in ("gptj", "llama", "qwen", "gemma", "t5")):
        pytest.skip("A merged additive edit needs a bias, which the output projections of this model do not have")


"""


def _mapping() -> str:
    lines = [f'    "t5": {T5},\n', f'    "mt5": {T5},\n']
    lines += [f'    "{family}": ["{name}"],\n' for name, families in TARGETS.items() for family in families.split()]
    return "TRANSFORMERS_MODELS_TO_JOLA_TARGET_MODULES_MAPPING = {\n" + "".join(lines) + "}\n\n"


# the line that begins the list, or the first line of the comments above it
_CONFIGS = r"(^#.*\n)*^ALL_CONFIGS = \[\n"


def _models(task: str) -> list[tuple[str, str, bool]]:
    return [
        (r"^    IA3Config,\n", "    JolaConfig,\n", True),
        (_CONFIGS, SOFT, False),
        (r"^ALL_CONFIGS = \[\n", ROWS.format(task=task), True),
    ]


def _unbiased_models(task: str) -> list[tuple[str, str, bool]]:
    skip = "        check_jola_config(config_cls, model_id, config_kwargs)\n"
    return [
        *_models(task),
        (r"^class Test\w+\(PeftCommonTester\):\n", CHECK, False),
        (r"^        self\._test_merge_layers\(model_id, .*\n", skip, False),
    ]


_NAMES = "TRANSFORMERS_MODELS_TO_{}_TARGET_MODULES_MAPPING"
_LISTED = [
    (rf"^    {_NAMES.format('IA3')},\n", f"    {_NAMES.format('JOLA')},\n", True),
    (rf'^    "{_NAMES.format("IA3")}",\n', f'    "{_NAMES.format("JOLA")}",\n', True),
]
_CLASSES = [
    (r'^    "IA3Model",\n', '    "JolaConfig",\n    "JolaModel",\n', True),
]

# file -> (a line, the text to put beside it, whether after the line)
EDITS: dict[str, list[tuple[str, str, bool]]] = {
    "src/peft/utils/peft_types.py": [
        (r"^    - IA3\n", "    - JOLA\n", True),
        (r'^    IA3 = "IA3"\n', '    JOLA = "JOLA"\n', True),
    ],
    "src/peft/utils/constants.py": [(rf"^{_NAMES.format('IA3')} = ", _mapping(), False)],
    "src/peft/utils/__init__.py": _LISTED,
    "src/peft/utils/other.py": _LISTED,
    "src/peft/tuners/__init__.py": [
        (r"^from \.ia3 import .*\n", "from .jola import JolaConfig, JolaModel\n", True),
        *_CLASSES,
    ],
    "src/peft/__init__.py": [(r"^    IA3Model,\n", "    JolaConfig,\n    JolaModel,\n", True), *_CLASSES],
    "tests/test_config.py": [
        (r"^    IA3Config,\n", "    JolaConfig,\n", True),
        (r"^    \(IA3Config, \{\}\),\n", "    (JolaConfig, {}),\n", True),
    ],
    "tests/test_custom_models.py": [
        (r"^    IA3Config,\n", "    JolaConfig,\n", True),
        (r"(^#.*\n)*^TEST_CASES = \[\n", SOFT, False),
        (r"^TEST_CASES = \[\n", CUSTOM, True),
        (r"^MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = \[\n", SEVERAL, True),
        (r"^MIXED_ADAPTER_TEST_CASES = \[\n", MIXED, True),
    ],
    "tests/test_decoder_models.py": _unbiased_models("CAUSAL_LM"),
    "tests/test_encoder_decoder_models.py": _unbiased_models("SEQ_2_SEQ_LM"),
    "tests/test_feature_extraction_models.py": _models("FEATURE_EXTRACTION"),
    "docs/source/_toctree.yml": [
        (
            r"^    - local: package_reference/ia3\n      title: .*\n",
            "    - local: package_reference/jola\n      title: JoLA\n",
            True,
        )
    ],
}


class NotPeft(ValueError):
    """The tree is not one of peft's, or one that has changed too much."""


def apply(root: Path) -> list[str]:
    """Lay JoLA over the source tree `root`.

    Source distributions have no documentation, and installed packages no tests: what a tree does not have is left out.

    Returns:
        the files that were changed or added.

    Raises:
        NotPeft: a file lacks the line beside which an entry belongs; nothing is written then.
    """
    if not (root / "src/peft/utils/peft_types.py").is_file():
        raise NotPeft(f"{root}: expected a source tree of peft, with src/peft/utils/peft_types.py")
    changed: dict[Path, str] = {}
    for name, edits in EDITS.items():
        path = root / name
        if path.is_file():
            before = path.read_text()
            after = before
            for line, text, behind in edits:
                after = _inserted(after, line, text, behind, name)
            if after != before:
                changed[path] = after
    for source in sorted(path for folder in ("src", "tests", "docs") for path in (HERE / folder).rglob("*")):
        target = root / source.relative_to(HERE)
        if source.is_file() and "__pycache__" not in source.parts and target.parents[1].is_dir():
            text = source.read_text()
            if not target.is_file() or target.read_text() != text:
                changed[target] = text
    for path, text in changed.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return [str(path.relative_to(root)) for path in changed]


def _inserted(content: str, line: str, text: str, behind: bool, name: str) -> str:
    found = list(re.finditer(line, content, re.MULTILINE))
    if not found:
        raise NotPeft(f"{name}: expected a line like {line!r}")
    match = found[0]
    at = match.end() if behind else match.start()
    beside = content[at : at + len(text)] if behind else content[at - len(text) : at]
    return content if beside == text else content[:at] + text + content[at:]


def main() -> int:
    """Apply, and list the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peft", type=Path, help="peft's source: a clone, or its unpacked source distribution")
    try:
        changed = apply(parser.parse_args().peft)
    except NotPeft as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(changed) or "nothing to do")
    return 0


if __name__ == "__main__":
    sys.exit(main())
