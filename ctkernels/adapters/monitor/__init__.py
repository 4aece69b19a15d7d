"""Monitoring edited heads in production: statistics, unusual inputs and drift, exported to Prometheus and OpenTelemetry."""

from .dashboard import alert_rules, grafana_dashboard
from .export import export_opentelemetry, export_prometheus
from .monitor import EditMonitor
from .pool_monitor import PoolMonitor

__all__ = [
    "EditMonitor",
    "PoolMonitor",
    "alert_rules",
    "export_opentelemetry",
    "export_prometheus",
    "grafana_dashboard",
]
