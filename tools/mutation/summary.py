"""The summary of a run: counts, and every undetected mutant with its analysis."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from .mutants import OPERATORS

Record = dict[str, object]

# Mutations that correspond to mistakes in the structure of kernels, not in formulas.
STRUCTURAL = (
    "dropped barrier",
    "missing mask",
    "loop of one turn",
    "wrong stride or displacement",
    "index constant off by one",
    "wrong partner in a sum",
    "another tensor",
    "other rounding of an index",
)


def counts(records: list[Record]) -> dict[str, object]:
    """Counts; ``share`` is the fraction detected of mutants that are not equivalent."""
    caught, equivalent = (sum(bool(r[key]) for r in records) for key in ("caught_by", "equivalent"))
    planted = len(records)
    share = round(caught / max(1, planted - equivalent), 4)
    survived = planted - caught - equivalent
    return {"planted": planted, "caught": caught, "equivalent": equivalent, "survived": survived, "share": share}


def _count(values: Iterable[object]) -> dict[str, int]:
    return dict(Counter(map(str, values)).most_common())


def summary(records: list[Record], cases: Iterable[str] = ()) -> dict[str, object]:
    """``cases``: those that should have records."""
    by_case = {
        case: [r for r in records if r["case"] == case] for case in dict.fromkeys(str(r["case"]) for r in records)
    }
    left = [r for r in records if r["survives"]]
    shown = ("case", "kernel", "operator", "before", "after", "survives")
    return {
        **counts(records),
        "structural": counts([r for r in records if r["operator"] in STRUCTURAL]),
        "by_toolchain": {t: counts([r for r in records if str(r["case"]).startswith(t)]) for t in ("triton", "cuda")},
        "by_operator": {name: counts([r for r in records if r["operator"] == name]) for name in OPERATORS},
        "by_case": {case: counts(found) for case, found in by_case.items()},
        "not_run": [case for case in cases if case not in by_case],
        "caught_by": _count(r["caught_by"] for r in records if r["caught_by"]),
        "caught_by_another_call": sum(
            not str(r["in"]).startswith(re.sub(r", sm_\d+$", "", str(r["case"]))) for r in records if r["caught_by"]
        ),
        "equivalent_because": _count(r["survives"] for r in left if r["equivalent"]),
        "survivors": [{key: r[key] for key in shown} for r in left if not r["equivalent"]],
    }
