"""Export of monitor metrics to Prometheus and OpenTelemetry; read from the device on collection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ..._extras import require
from .metrics import BY_HEAD, LABELS, METRICS, Metric, labels_of
from .monitor import EditMonitor


class _Collector:
    """A collector that prometheus-client calls at every scrape."""

    def __init__(self, monitors: tuple[EditMonitor, ...], core: Any) -> None:
        self.monitors, self.core = monitors, core

    def collect(self) -> Iterator[Any]:
        snapshots = [(monitor, monitor.snapshot()) for monitor in self.monitors]
        for metric in METRICS:
            samples = [
                ((*labels_of(monitor), *labels), value)
                for monitor, snapshot in snapshots
                for labels, value in metric.samples(snapshot, monitor)
            ]
            if not samples:
                continue
            names = (*LABELS, *BY_HEAD)[: len(samples[0][0])]
            kind = self.core.CounterMetricFamily if metric.counter else self.core.GaugeMetricFamily
            family = kind(metric.name, metric.help, labels=names)
            for labels, value in samples:
                family.add_metric(labels, value)
            yield family


def export_prometheus(*monitors: EditMonitor, registry: Any = None) -> Any:
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


def export_opentelemetry(*monitors: EditMonitor, meter: Any = None) -> Any:
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


def _observed(metric: Metric, monitors: tuple[EditMonitor, ...], observation: Any) -> Callable[[Any], list[Any]]:
    def observe(_: Any) -> list[Any]:
        return [
            observation(value, dict(zip((*LABELS, *BY_HEAD), (*labels_of(monitor), *labels))))
            for monitor in monitors
            for labels, value in metric.samples(monitor.snapshot(), monitor)
        ]

    return observe


def _checked(monitors: tuple[EditMonitor, ...]) -> tuple[EditMonitor, ...]:
    names = [labels_of(monitor) for monitor in monitors]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"monitors must be one or more, each with its own name or adapter, got {names}")
    return monitors
