"""The table of a monitor's metrics (names, kinds and values) behind the exporters, the dashboard and the alert rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .passes import PassMonitor
from .statistics import Snapshot, Statistics

LABELS = ("model", "adapter")  # of every metric
BY_HEAD = ("site", "head")
OTHERS = "__others__"  # the label of a pool's adapters without one of their own
Read = Callable[[Snapshot, Statistics], "float | Sequence[float] | None"]


@dataclass(frozen=True)
class Metric:
    """A metric of a monitor.

    Attributes:
        name: its name in OpenTelemetry; Prometheus has :attr:`series`.
        help: its description.
        read: a function that returns its value, or one per head; None if there is none yet.
        counter: True for a counter, False for a gauge. Without labels by head, a counter is summed over them, and of a gauge the
            largest counts.
    """

    name: str
    help: str
    read: Read
    counter: bool = True

    @property
    def series(self) -> str:
        """The name of the time series in Prometheus."""
        return f"{self.name}_total" if self.counter else self.name

    def samples(
        self, snapshot: Snapshot, statistics: Statistics, monitor: PassMonitor
    ) -> list[tuple[tuple[str, ...], float]]:
        """The values with their labels other than the monitor's: none, or site and head."""
        value = self.read(snapshot, statistics)
        if value is None:
            return []
        if isinstance(value, Sequence):
            if monitor.by_head:
                return [((site, str(head)), float(v)) for (site, head), v in zip(monitor.heads, value)]
            value = sum(value) if self.counter else max(value)
        return [((), float(value))]


def _largest(snapshot: Snapshot, statistics: Statistics) -> list[float] | None:
    """The largest sizes, None before the first token (they are minus infinity then)."""
    return snapshot.high if any(snapshot.count) else None


def _drift(statistics: Statistics) -> object:
    return statistics.reference.drift if statistics.reference is not None else None


INPUTS = Metric("ctkernels_inputs", "Inputs that were watched to their end.", lambda s, m: s.inputs)
OUTSIDE = Metric(
    "ctkernels_inputs_outside",
    "Inputs of which a token was outside the calibrated range of some head.",
    lambda s, m: None if m.reference is None else s.outside,
)
EXPECTED = Metric(
    "ctkernels_inputs_outside_expected",
    "Share of inputs outside the range among inputs like those of the calibration.",
    lambda s, m: None if m.reference is None else m.reference.outside,
    counter=False,
)
HEAD_OUTSIDE = Metric(
    "ctkernels_head_outside",
    "Inputs in which this head was outside its calibrated range.",
    lambda s, m: None if m.reference is None else s.beyond,
)
SIZE = Metric(
    "ctkernels_edit_size", "Sum over tokens of the edit's size relative to the head's output.", lambda s, m: s.total
)
TOKENS = Metric("ctkernels_edit_tokens", "Tokens in the sum of edit sizes.", lambda s, m: s.count)
LARGEST = Metric("ctkernels_edit_size_max", "Largest relative size of an edit so far.", _largest, counter=False)
WINDOWS = Metric(
    "ctkernels_drift_windows", "Windows of inputs held against the calibration.",
    lambda s, m: None if _drift(m) is None else s.windows,
)  # fmt: skip
ALARMS = Metric(
    "ctkernels_drift_alarms", "Windows of which some head's distance was above the threshold.",
    lambda s, m: None if _drift(m) is None else s.alarms,
)  # fmt: skip
DRIFT = Metric(
    "ctkernels_drift",
    "Kolmogorov-Smirnov distance of the head's edits in the last full window from the calibration.",
    lambda s, m: s.drift,
    counter=False,
)
THRESHOLD = Metric(
    "ctkernels_drift_threshold",
    "Distance above which a window is an alarm.",
    lambda s, m: m.reference.drift.threshold if m.reference is not None and m.reference.drift is not None else None,
    counter=False,
)
METRICS = (INPUTS, OUTSIDE, EXPECTED, HEAD_OUTSIDE, SIZE, TOKENS, LARGEST, WINDOWS, ALARMS, DRIFT, THRESHOLD)
