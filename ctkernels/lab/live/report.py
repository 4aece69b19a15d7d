"""The content of the live page: the last inputs of a monitor, with the edits of every head."""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch

from ... import __version__
from ..._extras import require
from ...adapters.jola.heat_map import heat_maps
from ...adapters.monitor import EditMonitor
from ...adapters.monitor.inputs import Inputs
from ..jola.scoring import tail_inputs
from ..report import figures
from ..report.page import template
from ..report.section import Picture, Table

SHOWN = 20  # rows
HEADS = 5  # in the table of a row
TOKENS = 400  # of a typed text; longer ones lose their beginning
LONGEST = 1 << 14  # characters of a typed text


class LiveReport:
    """The live page and its content, as HTML.

    Args:
        monitor: with a history.
        tokenizer: of the monitor's model.

    Raises:
        ValueError: the monitor keeps no history.
        ImportError: Jinja2 or matplotlib is missing; the message names the extra.
    """

    def __init__(self, monitor: EditMonitor, tokenizer: Any) -> None:
        if not monitor.recent.maxlen:
            raise ValueError(
                "monitor must keep a history for the live page, got one without: EditMonitor(..., history=20)"
            )
        require("jinja2", "lab", "the live page")
        require("matplotlib", "lab", "the live page")
        self.monitor, self.tokenizer = (
            monitor,
            copy.deepcopy(tokenizer),
        )  # a fast tokenizer cannot be used by two threads
        self._lock = threading.Lock()
        self._drawn: dict[tuple[str, bool], tuple[int, str]] = {}

    def page(self, nonce: str) -> str:
        """The page without inputs. ``nonce``: allows its own script and style only."""
        return template("live_page.html", __package__).render(nonce=nonce, version=__version__, most=LONGEST)

    def feed(self, dark: bool, known: dict[str, int]) -> dict[str, Any]:
        """The last rows, newest first, and the facts above them. Rows whose version is ``known`` have no HTML."""
        with self._lock:
            rows = [(inputs, row) for inputs in list(self.monitor.recent) for row in range(len(inputs))]
            entries = []
            for inputs, row in rows[: -SHOWN - 1 : -1]:
                key = f"{inputs.number}-{row}"
                html = None if known.get(key) == inputs.passes else self._entry(inputs, row, key, dark)
                entries.append({"id": key, "version": inputs.passes, "html": html})
            keys = {(entry["id"], dark) for entry in entries}
            self._drawn = {key: drawn for key, drawn in self._drawn.items() if key in keys}
            return {"facts": template("live_facts.html", __package__).render(facts=self._facts()), "entries": entries}

    @torch.inference_mode()
    def read(self, text: str) -> None:
        """Passes a text to the model. It becomes the newest input, but is not counted.

        Raises:
            ValueError: the text has no tokens.
        """
        with self._lock:
            ids = list(self.tokenizer(text)["input_ids"])[-TOKENS:]
        if not ids or not text.strip():
            raise ValueError("text must not be empty")
        model: Any = self.monitor.model
        row = torch.tensor([ids], device=next(model.parameters()).device)
        with self.monitor.aside():
            model(**tail_inputs(model, row, torch.ones_like(row), 1))

    def _facts(self) -> list[tuple[str, str]]:
        monitor, snapshot = self.monitor, self.monitor.snapshot()
        facts = [
            ("Model", monitor.name),
            ("Adapter", ", ".join(monitor.adapter_names)),
            ("Inputs counted", f"{snapshot.inputs}" + (f", one batch of {monitor.every}" if monitor.every > 1 else "")),
        ]
        if (reference := monitor.reference) is None:
            return [*facts, ("Calibration", "none: no input can be told to be unusual")]
        share = f"{100 * snapshot.outside / snapshot.inputs:.1f} %" if snapshot.inputs else "–"
        expected = "" if reference.outside is None else f", {100 * reference.outside:.1f} % expected"
        facts.append(("Outside the calibrated range", f"{share} of them{expected}"))
        if reference.drift is not None:
            drift = "no full window yet" if snapshot.drift is None else f"{max(snapshot.drift):.3f} in the last window"
            facts.append(("Drift", f"{drift}, alarm above {reference.drift.threshold:.3f}"))
        return facts

    def _entry(self, inputs: Inputs, row: int, key: str, dark: bool) -> str:
        """A row as HTML, cached by version and theme."""
        version, html = self._drawn.get((key, dark), (0, ""))
        if version == inputs.passes:
            return html
        version, monitor = inputs.passes, self.monitor
        sizes = inputs.mean[row].tolist()
        beyond = monitor.beyond(inputs)[row].tolist() if monitor.reference is not None else [False] * len(sizes)
        tokens = [token for ids, real in list(inputs.ids) for token in ids[row][real[row]].tolist()]
        text = self.tokenizer.decode(tokens) if tokens else "(no tokens: the model was given embeddings)"
        html = template("live_entry.html", __package__).render(
            key=key,
            text=text,
            tokens=int(inputs.count[row].amax()),
            beyond=sum(beyond),
            calibrated=monitor.reference is not None,
            picture=self._picture(sizes, key, dark),
            table=self._table(sizes, beyond, key),
        )
        self._drawn[key, dark] = (version, html)
        return html

    def _picture(self, sizes: list[float], key: str, dark: bool) -> Picture:
        monitor, numbers = self.monitor, iter(sizes)
        widest = max(monitor.sites.values())
        grid = [
            [next(numbers) for _ in range(heads)] + [float("nan")] * (widest - heads)
            for heads in monitor.sites.values()
        ]
        reference = monitor.reference
        most = max(sizes) if reference is None else float(reference.high.amax())
        percent = [[100 * size for size in layer] for layer in grid]
        scale = "edit, % of the head's output"
        figure = heat_maps([{"": percent}], [""], "", scale, most=100 * most or 1.0, dark=dark)
        site, head = monitor.heads[sizes.index(max(sizes))]
        alt = (
            f"Heat map of the edit's size by layer and head in input {key}. The largest is {100 * max(sizes):.1f} % of the "
            f"output of head {head} of {site}."
        )
        return Picture(figures.data_uri(figure, "png"), alt)

    def _table(self, sizes: list[float], beyond: list[bool], key: str) -> Table:
        reference = self.monitor.reference
        order = sorted(range(len(sizes)), key=lambda i: (-beyond[i], -sizes[i]))[:HEADS]
        header = ["projection", "head", "mean edit, %"] + ([] if reference is None else ["calibrated, %", ""])
        rows = []
        for i in order:
            site, head = self.monitor.heads[i]
            row = [site, str(head), f"{100 * sizes[i]:.1f}"]
            if reference is not None:
                low, high = float(reference.low[i]), float(reference.high[i])
                row += [f"{100 * low:.1f} to {100 * high:.1f}", "a token outside" if beyond[i] else ""]
            rows.append(row)
        return Table(f"Heads that edit most in input {key}", header, rows, () if reference is None else (4,))
