"""Progress bars, and the time that parts of the work take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .._extras import require


@contextmanager
def bar(total: int | None, text: str, show: bool) -> Iterator[Callable[[int], object]]:
    """Show a progress bar on standard error, of so many steps if that is known, and yield the function that advances it."""
    if not show:
        yield lambda step: None
        return
    tqdm = require("tqdm", "lab", "a progress bar").tqdm
    with tqdm(total=total, desc=text, leave=False, mininterval=0.5) as shown:
        yield shown.update


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the time that the context takes to ``seconds[name]``."""
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
