"""Export of monitor metrics to Prometheus and OpenTelemetry; read from the device on collection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ..._extras import require
from .metrics import BY_HEAD, LABELS, METRICS, Metric
from .passes import PassMonitor


class _Collector:
    """A collector that prometheus-client calls at every scrape."""

    def __init__(self, monitors: tuple[PassMonitor, ...], core: Any) -> None:
        self.monitors, self.core = monitors, core

    def collect(self) -> Iterator[Any]:
        snapshots = [
            ((monitor.name, adapter), statistics.snapshot(), statistics, monitor)
            for monitor in self.monitors
            for adapter, statistics in monitor.statistics_by_adapter()
        ]
        for metric in METRICS:
            kind = self.core.CounterMetricFamily if metric.counter else self.core.GaugeMetricFamily
            family = kind(metric.name, metric.help)
            for names, snapshot, statistics, monitor in snapshots:
                for labels, value in metric.samples(snapshot, statistics, monitor):
                    family.add_sample(metric.series, dict(zip((*LABELS, *BY_HEAD), (*names, *labels))), value)
            if family.samples:
                yield family


def export_prometheus(*monitors: PassMonitor, registry: Any = None) -> Any:
    """Register the metrics of monitors with prometheus-client.

    Values are read from the device only when Prometheus scrapes. Serve them with, for example,
    ``prometheus_client.start_http_server(port)``.

    Args:
        monitors: monitors of different models or adapters.
        registry: a prometheus-client registry. Default: the global one.

    Returns:
        the collector, for ``registry.unregister``.

    Raises:
        ValueError: there are no monitors, or two have the same name and adapter.
        ImportError: prometheus-client is missing; the message names the extra.

    Examples:
        >>> collector = export_prometheus(EditMonitor(model))
    """
    client = require("prometheus_client", "monitor", "exporting metrics to Prometheus")
    core = require("prometheus_client.core", "monitor", "exporting metrics to Prometheus")
    collector = _Collector(_checked(monitors), core)
    (client.REGISTRY if registry is None else registry).register(collector)
    return collector


def export_opentelemetry(*monitors: PassMonitor, meter: Any = None) -> Any:
    """Create observable OpenTelemetry instruments for the metrics of monitors.

    Args:
        monitors: monitors of different models or adapters.
        meter: the meter that creates the instruments. Default: ``opentelemetry.metrics.get_meter("ctkernels")``.

    Returns:
        the meter.

    Raises:
        ValueError: there are no monitors, or two have the same name and adapter.
        ImportError: opentelemetry-api is missing; the message names the extra.

    Examples:
        >>> meter = export_opentelemetry(EditMonitor(model))
    """
    api = require("opentelemetry.metrics", "monitor", "exporting metrics to OpenTelemetry")
    watched = _checked(monitors)
    meter = api.get_meter("ctkernels") if meter is None else meter
    for metric in METRICS:
        create = meter.create_observable_counter if metric.counter else meter.create_observable_gauge
        create(metric.name, callbacks=[_observed(metric, watched, api.Observation)], description=metric.help)
    return meter


def _observed(metric: Metric, monitors: tuple[PassMonitor, ...], observation: Any) -> Callable[[Any], list[Any]]:
    def observe(_: Any) -> list[Any]:
        return [
            observation(value, dict(zip((*LABELS, *BY_HEAD), (monitor.name, adapter, *labels))))
            for monitor in monitors
            for adapter, statistics in monitor.statistics_by_adapter()
            for labels, value in metric.samples(statistics.snapshot(), statistics, monitor)
        ]

    return observe


def _checked(monitors: tuple[PassMonitor, ...]) -> tuple[PassMonitor, ...]:
    names = [(monitor.name, monitor.label) for monitor in monitors]
    mixed = [name for name, label in names if label is None]  # of pools, which may serve any adapter
    models = [name for name, _ in names]
    if not names or len(set(names)) < len(names) or any(models.count(name) > 1 for name in mixed):
        raise ValueError(f"monitors must be one or more, each with its own name or adapter, got {names}")
    return monitors
