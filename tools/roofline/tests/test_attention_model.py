"""The cost model that chooses an attention implementation, against times measured on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from ctkernels.ops.attention import cost_model


def test_the_cost_model_agrees_with_what_was_measured():
    """On an H100: within a factor of two, and, where one implementation took a third longer than the other, which."""
    results = Path(__file__).parents[3] / "benchmarks/results/h100.json"
    for record in json.loads(results.read_text())["attention"]["records"]:
        problem, kernel = record["problem"], record["torch_kernel"]
        options = {"is_causal": True} | problem["options"]
        itemsize, causal = 4 if record["dtype"] == "fp32" else 2, options["is_causal"] and problem["tokens"] > 1
        window = options.get("window")
        sizes = [problem[name] for name in ("batch", "heads", "groups", "tokens", "keys", "head_dim", "head_dim")]
        shape = cost_model.Shape(*sizes, itemsize, causal and window is None, False, window)
        masked = problem["padded"] or window is not None
        for key, training in (("forward_ms", False), ("forward_backward_ms", True)):
            if key not in record:
                continue
            ours = shape._replace(training=training)
            theirs = ours._replace(causal=ours.causal and not masked)
            predicted = {
                "fused": cost_model.seconds(cost_model.PEAKS[9], ours, "fused") * 1e3,
                "separate": cost_model.seconds(cost_model.PEAKS[9], theirs, kernel) * 1e3,
            }
            measured = {name: record[key][name] for name in predicted}
            faster, slower = sorted(measured, key=lambda name: measured[name])
            where = f"{record['case']}, {record['dtype']}, {key}: {measured}, predicted {predicted}"
            if measured[slower] > 4 / 3 * measured[faster]:
                assert predicted[faster] < predicted[slower], where
            assert 0.5 < predicted["fused"] / measured["fused"] < 2, where
