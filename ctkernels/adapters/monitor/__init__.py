"""Monitoring edited heads in production: statistics, unusual inputs and drift, exported to Prometheus and OpenTelemetry."""

from .dashboard import alert_rules, grafana_dashboard
from .export import export_opentelemetry, export_prometheus
from .monitor import EditMonitor

__all__ = ["EditMonitor", "alert_rules", "export_opentelemetry", "export_prometheus", "grafana_dashboard"]
