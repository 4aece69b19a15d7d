"""Writes docs/monitoring, a Grafana dashboard and Prometheus alert rules: ``python tools/monitoring.py``."""

from __future__ import annotations

import json
from pathlib import Path

from ctkernels.adapters import alert_rules, grafana_dashboard

FOLDER = Path(__file__).parent.parent / "docs" / "monitoring"


def files() -> dict[str, str]:
    """Name and content of every file."""
    return {"grafana.json": json.dumps(grafana_dashboard(), indent=1) + "\n", "alerts.yml": alert_rules()}


if __name__ == "__main__":
    for name, text in files().items():
        (FOLDER / name).write_text(text)
