"""A progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .._extras import require


@contextmanager
def bar(total: int, text: str, show: bool) -> Iterator[Callable[[int], object]]:
    """A progress bar on standard error; gives the function that advances it."""
    if not show:
        yield lambda step: None
        return
    tqdm = require("tqdm", "lab", "a progress bar").tqdm
    with tqdm(total=total, desc=text, leave=False, mininterval=0.5) as shown:
        yield shown.update
