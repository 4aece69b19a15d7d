"""Progress bars and timing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .._extras import require


@contextmanager
def bar(total: int | None, text: str, show: bool) -> Iterator[Callable[[int], object]]:
    """Shows a progress bar on standard error and yields the function that advances it. ``total``: steps, if known."""
    if not show:
        yield lambda step: None
        return
    tqdm = require("tqdm", "lab", "a progress bar").tqdm
    with tqdm(total=total, desc=text, leave=False, mininterval=0.5) as progress_bar:
        yield progress_bar.update


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the duration of the context to ``seconds[name]``."""
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
