"""The monitor's metrics: in Prometheus itself, in OpenTelemetry's SDK, and in the dashboard and the rules made from them."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import torch
from jola_families import build, inputs

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
adapters = pytest.importorskip("ctkernels.adapters")

from ctkernels.adapters.monitor.metrics import BY_HEAD, LABELS, METRICS  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
ROOT = Path(__file__).parents[2]
TOKENS = inputs("llama", batch=3)["input_ids"]
SITE = "model.layers.1.self_attn.o_proj"


def _watched(name="tiny", **values):
    """A calibrated monitor that saw 12 inputs and a window and a half of drift."""
    torch.manual_seed(1)
    model = peft.get_peft_model(build("llama"), adapters.JolaConfig(init_std=0.3)).eval()
    monitor = adapters.EditMonitor(model, name=name, **{"window": 8, "every": 1, **values})
    monitor.calibrate([{"input_ids": (TOKENS + i) % 60} for i in range(6)])
    with monitor, torch.no_grad():
        for i in range(4):
            model(input_ids=(TOKENS * (i + 2)) % 61)
        monitor.begin()
    return monitor


@pytest.fixture(scope="module")
def monitor():
    return _watched()


@pytest.fixture
def client():
    return pytest.importorskip("prometheus_client", reason="exporting needs prometheus-client")


def _expected(monitor):
    """Every series by name and labels, as `snapshot` and `reference` say; the words here are not those of the table."""
    seen, reference = monitor.snapshot(), monitor.reference
    model = {"model": monitor.name, "adapter": "default"}
    values = {
        "ctkernels_inputs_total": 12,
        "ctkernels_inputs_outside_total": seen.outside,
        "ctkernels_inputs_outside_expected": reference.outside,
        "ctkernels_drift_windows_total": 1,
        "ctkernels_drift_alarms_total": seen.alarms,
        "ctkernels_drift_threshold": reference.drift.threshold,
    }
    found = {(name, frozenset(model.items())): value for name, value in values.items()}
    for name, column in (
        ("ctkernels_head_outside_total", seen.beyond),
        ("ctkernels_edit_size_total", seen.total),
        ("ctkernels_edit_tokens_total", seen.count),
        ("ctkernels_edit_size_max", seen.high),
        ("ctkernels_drift", seen.drift),
    ):
        for (site, head), value in zip(monitor.heads, column, strict=True):
            found[name, frozenset({**model, "site": site, "head": str(head)}.items())] = value
    return found


def test_every_metric_is_exported_with_its_value(monitor, client):
    registry = client.CollectorRegistry()
    collector = adapters.export_prometheus(monitor, registry=registry)
    found = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in registry.collect()
        for sample in family.samples
    }
    assert found == pytest.approx(_expected(monitor))
    assert {name for name, _ in found} == {metric.series for metric in METRICS}
    registry.unregister(collector)
    assert not list(registry.collect())


def test_a_monitor_without_calibration_exports_what_it_has(client):
    torch.manual_seed(1)
    model = peft.get_peft_model(build("llama"), adapters.JolaConfig(init_std=0.3)).eval()
    fresh = adapters.EditMonitor(model)
    registry = client.CollectorRegistry()
    adapters.export_prometheus(fresh, registry=registry)
    names = {sample.name for family in registry.collect() for sample in family.samples}
    assert names == {"ctkernels_inputs_total", "ctkernels_edit_size_total", "ctkernels_edit_tokens_total"}
    assert fresh.name == "LlamaForCausalLM"


def test_monitors_are_told_apart_by_name(monitor, client):
    registry = client.CollectorRegistry()
    adapters.export_prometheus(monitor, _watched("other"), registry=registry)
    samples = [s for f in registry.collect() for s in f.samples if s.name == "ctkernels_inputs_total"]
    assert [s.labels["model"] for s in samples] == ["tiny", "other"]
    for wrong in ((), (monitor, monitor)):
        with pytest.raises(ValueError, match="monitors must be one or more, each with its own name"):
            adapters.export_prometheus(*wrong, registry=registry)


def test_opentelemetry_reads_the_same_values(monitor):
    sdk = pytest.importorskip("opentelemetry.sdk.metrics", reason="exporting needs opentelemetry-sdk")
    export = pytest.importorskip("opentelemetry.sdk.metrics.export")
    reader = export.InMemoryMetricReader()
    provider = sdk.MeterProvider([reader])
    adapters.export_opentelemetry(monitor, meter=provider.get_meter("ctkernels"))
    counters = {metric.name for metric in METRICS if metric.counter}
    found = {}
    for metric in reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics:
        assert (getattr(metric.data, "is_monotonic", False), metric.description != "") == (
            metric.name in counters,
            True,
        )
        for point in metric.data.data_points:
            suffix = "_total" if metric.name in counters else ""
            found[metric.name + suffix, frozenset(point.attributes.items())] = point.value
    assert found == pytest.approx(_expected(monitor))
    provider.shutdown()


@pytest.mark.parametrize(
    ("export", "module"),
    [("export_prometheus", "prometheus_client"), ("export_opentelemetry", "opentelemetry.metrics")],
)
def test_a_missing_package_is_named_with_its_extra(monitor, export, module, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ImportError, match=r"ctkernels\[monitor\]"):
        getattr(adapters, export)(monitor)


# --- the dashboard and the rules --------------------------------------------------------------------------------------


def _queries():
    return [target["expr"] for panel in adapters.grafana_dashboard()["panels"] for target in panel["targets"]]


def test_the_files_are_made_from_the_names():
    import monitoring

    for name, text in monitoring.files().items():
        assert (ROOT / "docs" / "monitoring" / name).read_text() == text, "run python tools/monitoring.py"


def test_the_dashboard_asks_for_what_is_exported():
    named = {name for query in [*_queries(), adapters.alert_rules()] for name in re.findall(r"ctkernels_\w+", query)}
    assert named == {metric.series for metric in METRICS}  # nothing else, and nothing is left out
    dashboard = adapters.grafana_dashboard()
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["source", *LABELS]
    for query in _queries():
        assert set(re.findall(r"\$(\w+)", query)) == set(LABELS), query
    legends = {
        label
        for p in dashboard["panels"]
        for t in p["targets"]
        for label in re.findall(r"{{(\w+)}}", t["legendFormat"])
    }
    assert legends == set(BY_HEAD)


def test_the_dashboard_is_of_grafanas_schema():
    """Grafana's own classes for dashboards read every field, and write the same."""
    pytest.importorskip("grafana_foundation_sdk", reason="Grafana's schema needs grafana-foundation-sdk")
    from grafana_foundation_sdk.cog import encoder, plugins
    from grafana_foundation_sdk.models import dashboard, prometheus

    plugins.register_default_plugins()
    values = adapters.grafana_dashboard()
    read = dashboard.Dashboard.from_json(values)
    assert {type(target) for panel in read.panels for target in panel.targets} == {prometheus.Dataquery}
    assert _missing(values, json.loads(encoder.JSONEncoder().encode(read))) == []
    values["panels"][0]["targets"][0]["query"] = "up"
    again = json.loads(encoder.JSONEncoder().encode(dashboard.Dashboard.from_json(values)))
    assert _missing(values, again) == [".panels.0.targets.0.query"]  # it would not know another field


def _missing(values, other, path=""):
    """The paths in `values` that `other` has not, or has with another value."""
    if isinstance(values, dict) or (isinstance(values, list) and isinstance(other, list) and len(other) == len(values)):
        items = values.items() if isinstance(values, dict) else enumerate(values)
        return [
            found
            for key, value in items
            for found in (
                _missing(value, other[key], f"{path}.{key}")
                if isinstance(other, list) or key in other
                else [f"{path}.{key}"]
            )
        ]
    return [] if values == other else [path]


# --- in Prometheus ----------------------------------------------------------------------------------------------------

PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
needs_prometheus = pytest.mark.skipif(
    PROMETHEUS is None or PROMTOOL is None, reason="no Prometheus on this machine: apt-get install prometheus"
)


@pytest.fixture
def server(tmp_path, monitor, client):
    """Prometheus, scraping a monitor of this process; a function that asks its API."""
    registry = client.CollectorRegistry()
    adapters.export_prometheus(monitor, registry=registry)
    exporter, thread = client.start_http_server(0, addr="127.0.0.1", registry=registry)
    (tmp_path / "alerts.yml").write_text(adapters.alert_rules())
    (tmp_path / "prometheus.yml").write_text(
        "global: {scrape_interval: 200ms, evaluation_interval: 200ms}\n"
        "rule_files: [alerts.yml]\n"
        f"scrape_configs: [{{job_name: t, static_configs: [{{targets: ['127.0.0.1:{exporter.server_port}']}}]}}]\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [
        f"--config.file={tmp_path / 'prometheus.yml'}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([PROMETHEUS, *arguments], stdout=log, stderr=log)

    def ask(path, **values):
        url = f"http://127.0.0.1:{port}/api/v1/{path}?{urllib.parse.urlencode(values)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            body = json.load(answer)
        assert body["status"] == "success"
        return body["data"]

    try:
        yield lambda path, wanted, **values: _until(lambda: ask(path, **values), wanted, process, tmp_path / "log")
    finally:
        process.terminate()
        process.wait(30)
        exporter.shutdown()
        exporter.server_close()
        thread.join(10)


def _until(ask, wanted, process, log):
    """The answer once ``wanted`` holds for it."""
    deadline, answer = time.monotonic() + 60, None
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            answer = ask()
        except OSError:  # it is starting
            pass
        else:
            if wanted(answer):
                return answer
        time.sleep(0.1)
    raise AssertionError(f"not in time, the last answer: {answer}\n{log.read_text()[-2000:]}")


@needs_prometheus
def test_prometheus_scrapes_every_value(server, monitor):
    names = "|".join(metric.series for metric in METRICS)
    expected = _expected(monitor)
    answer = server("query", lambda a: len(a["result"]) == len(expected), query=f'{{__name__=~"{names}"}}')
    found = {}
    for series in answer["result"]:
        labels = {k: v for k, v in series["metric"].items() if k not in ("__name__", "instance", "job")}
        found[series["metric"]["__name__"], frozenset(labels.items())] = float(series["value"][1])
    assert found == pytest.approx(expected)


@needs_prometheus
def test_every_panel_shows_something(server):
    for query in _queries():
        for label in LABELS:
            query = query.replace(f"${label}", ".*")
        # rates need two scrapes, and none of what this monitor counted grows any more
        query = re.sub(r"\) > 0\)", ") >= 0)", query).replace("[15m]", "[1m]")
        answer = server("query", lambda a: bool(a["result"]), query=query)
        assert len(answer["result"]) >= 1, query


@needs_prometheus
def test_prometheus_evaluates_the_rules(server):
    def evaluated(answer):
        rules = [rule for group in answer["groups"] for rule in group["rules"]]
        return len(rules) == 3 and all(rule["health"] != "unknown" for rule in rules)

    answer = server("rules", evaluated)
    assert {rule["health"] for group in answer["groups"] for rule in group["rules"]} == {"ok"}


@needs_prometheus
def test_the_rules_fire_when_they_should_and_only_then(tmp_path):
    """Promtool's own unit tests: series go in, alerts come out."""
    (tmp_path / "alerts.yml").write_text(adapters.alert_rules())
    subprocess.run([PROMTOOL, "check", "rules", str(tmp_path / "alerts.yml")], check=True, capture_output=True)

    def series(outside, drift, threshold="0.4x60"):
        labels = 'model="m", adapter="a"'
        rows = [
            (f"ctkernels_inputs_total{{{labels}}}", "0+60x60"),
            (f"ctkernels_inputs_outside_total{{{labels}}}", f"0+{outside}x60"),
            (f"ctkernels_inputs_outside_expected{{{labels}}}", "0.02x60"),
            (f'ctkernels_drift{{{labels}, site="s", head="0"}}', "0.1x60"),
            (f'ctkernels_drift{{{labels}, site="s", head="1"}}', f"{drift}x60"),
            (f"ctkernels_drift_threshold{{{labels}}}", threshold),
        ]
        return [
            {"series": name, "values": values.replace("x", "+0x") if "+" not in values else values}
            for name, values in rows
        ]

    def case(rows, firing):
        names = ("EditsOutsideRange", "EditsDrift", "EditsNotCalibrated")
        tests = []
        for name in names:
            labels = {"severity": "info" if name == "EditsNotCalibrated" else "warning", "model": "m", "adapter": "a"}
            tests.append(
                {
                    "alertname": name,
                    "eval_time": "40m",
                    "exp_alerts": [{"exp_labels": labels}] if name in firing else [],
                }
            )
        return {"interval": "1m", "input_series": rows, "alert_rule_test": tests}

    def only(rows, *names):
        return [row for row in rows if not row["series"].startswith(names)]

    usual = series(1, 0.2)
    cases = [
        case(usual, ()),
        case(series(2, 0.2), ()),  # 3 %, within chance of twice the expected 2 %
        case(series(12, 0.2), ("EditsOutsideRange",)),
        case(series(1, 0.5), ("EditsDrift",)),
        case(only(usual, "ctkernels_drift_threshold", "ctkernels_drift{"), ("EditsNotCalibrated",)),
    ]
    # promtool compares annotations too: take the rules without them
    rules = re.sub(r" +annotations:\n( {10,}.*\n)+", "", adapters.alert_rules())
    assert "annotations" not in rules
    (tmp_path / "bare.yml").write_text(rules)
    (tmp_path / "test.yml").write_text(
        json.dumps({"rule_files": ["bare.yml"], "evaluation_interval": "1m", "tests": cases})
    )
    done = subprocess.run([PROMTOOL, "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
