"""A Grafana dashboard and Prometheus alert rules for the metrics of monitors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .metrics import (
    ALARMS,
    DRIFT,
    EXPECTED,
    HEAD_OUTSIDE,
    INPUTS,
    LABELS,
    LARGEST,
    OTHERS,
    OUTSIDE,
    SIZE,
    THRESHOLD,
    TOKENS,
    WINDOWS,
)

BY = f"by ({', '.join(LABELS)})"
CHOSEN = "{" + ", ".join(f'{label}=~"${label}"' for label in LABELS) + "}"
SHARE = f"sum {BY} (rate({OUTSIDE.series}%s[15m])) / sum {BY} (rate({INPUTS.series}%s[15m]))"


def grafana_dashboard() -> dict[str, Any]:
    """The dashboard as values for JSON, for import into Grafana 9 or later.

    Examples:
        >>> grafana_dashboard()["title"]
        'Edited heads'
    """
    panels = [
        _panel(
            "Inputs outside the calibrated range",
            "Share of inputs in 15 minutes, and what inputs like those of the calibration would show.",
            {"outside": SHARE % (CHOSEN, CHOSEN), "expected": f"max {BY} ({EXPECTED.series}{CHOSEN})"},
            unit="percentunit",
        ),
        _panel(
            "Drift",
            "Largest distance of a head's edits in the last window from those of the calibration, and the threshold.",
            {"largest": f"max {BY} ({DRIFT.series}{CHOSEN})", "threshold": f"max {BY} ({THRESHOLD.series}{CHOSEN})"},
        ),
        _panel(
            "Heads that drift most",
            "The ten largest distances.",
            {"{{site}} {{head}}": f"topk(10, {DRIFT.series}{CHOSEN})"},
        ),
        _panel(
            "Windows above the threshold",
            "In an hour, and all windows.",
            {
                "alarms": f"sum {BY} (increase({ALARMS.series}{CHOSEN}[1h]))",
                "windows": f"sum {BY} (increase({WINDOWS.series}{CHOSEN}[1h]))",
            },
        ),
        _panel(
            "Heads outside their range most often",
            "The ten heads that were outside in most inputs of an hour.",
            {"{{site}} {{head}}": f"topk(10, increase({HEAD_OUTSIDE.series}{CHOSEN}[1h]))"},
        ),
        _panel(
            "Mean size of edits",
            "Relative to the head's output, over the tokens of 15 minutes; the ten largest.",
            {
                "{{site}} {{head}}": f"topk(10, rate({SIZE.series}{CHOSEN}[15m]) / (rate({TOKENS.series}{CHOSEN}[15m]) > 0))"
            },
            unit="percentunit",
        ),
        _panel(
            "Largest edits",
            "Relative to the head's output, since the monitor began; the ten largest.",
            {"{{site}} {{head}}": f"topk(10, {LARGEST.series}{CHOSEN})"},
            unit="percentunit",
        ),
        _panel("Watched inputs", "Inputs a second.", {"inputs": f"sum {BY} (rate({INPUTS.series}{CHOSEN}[5m]))"}),
    ]
    for number, panel in enumerate(panels):
        panel["id"], panel["gridPos"] = number + 1, {"h": 8, "w": 12, "x": 12 * (number % 2), "y": 8 * (number // 2)}
    variables = [
        {
            "name": label,
            "label": label.capitalize(),
            "type": "query",
            "datasource": _SOURCE,
            "query": {"query": f"label_values({INPUTS.series}, {label})", "refId": label},
            "refresh": 2,
            "includeAll": True,
            "multi": True,
            "current": {"text": "All", "value": "$__all"},
        }
        for label in LABELS
    ]
    source = {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    return {
        "title": "Edited heads",
        "uid": "ctkernels-edits",
        "tags": ["ctkernels"],
        "schemaVersion": 37,
        "editable": True,
        "refresh": "1m",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [source, *variables]},
        "panels": panels,
    }


_SOURCE = {"type": "prometheus", "uid": "${source}"}


def _panel(title: str, about: str, queries: Mapping[str, str], unit: str = "none") -> dict[str, Any]:
    """A panel; ``queries`` maps legends to expressions."""
    return {
        "title": title,
        "description": about,
        "type": "timeseries",
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0, "custom": {"lineWidth": 2}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + i), "expr": expression, "legendFormat": legend, "datasource": _SOURCE}
            for i, (legend, expression) in enumerate(queries.items())
        ],
    }


def alert_rules() -> str:
    """Prometheus alert rules as YAML: inputs outside the range, drift, and a monitor without calibration.

    Examples:
        >>> print(alert_rules())
        groups:
        ...
    """
    expected = f"max {BY} ({EXPECTED.series})"
    count = f"sum {BY} (increase({INPUTS.series}[15m]))"
    rules = [
        (
            "EditsOutsideRange",
            # four standard errors above twice the expected share, which is a rough estimate
            f"{SHARE % ('', '')} > 2 * {expected} + 4 * sqrt({expected} * (1 - {expected}) / {count})",
            "5m",
            "warning",
            "{{ $value | humanizePercentage }} of the inputs are outside the range of the calibration",
            "Inputs of {{ $labels.model }} are unlike those that adapter {{ $labels.adapter }} was calibrated on. "
            f"{HEAD_OUTSIDE.series} says in which heads.",
        ),
        (
            "EditsDrift",
            f"max {BY} ({DRIFT.series}) > max {BY} ({THRESHOLD.series})",
            "0m",
            "warning",
            "The edits of the last window are distributed unlike those of the calibration",
            "The largest distance of a head of {{ $labels.model }}, adapter {{ $labels.adapter }}, is {{ $value }}. "
            f"{DRIFT.series} says of which heads. By chance this happens in one window of a thousand, or as often as "
            "the monitor's false_alarms says.",
        ),
        (
            "EditsNotCalibrated",
            f'max {BY} ({INPUTS.series}{{adapter!="{OTHERS}"}}) unless max {BY} ({THRESHOLD.series})',
            "15m",
            "info",
            "A monitor has no calibration, or one of too few inputs to know drift",
            "Calibrate the monitor of {{ $labels.model }}, adapter {{ $labels.adapter }}, and save the reference beside it.",
        ),
    ]
    lines = ["groups:", "  - name: ctkernels", "    rules:"]
    for name, expression, duration, severity, summary, description in rules:
        lines += [
            f"      - alert: {name}",
            "        expr: >-",
            f"          {expression}",
            f"        for: {duration}",
            "        labels:",
            f"          severity: {severity}",
            "        annotations:",
            "          summary: >-",
            f"            {summary}",
            "          description: >-",
            f"            {description}",
        ]
    return "\n".join(lines) + "\n"
