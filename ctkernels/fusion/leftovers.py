"""Removes placeholders that a forward stored while it was traced.

Tracing runs a forward on copies of its modules, but it may also write to classes, globals and caches of functions.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable
from typing import Any

_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)


class Namespaces:
    """Snapshot of the globals and class attributes that a forward may write to, and of containers in them."""

    def __init__(self, classes: Iterable[type]) -> None:
        self.saved: list[tuple[Any, dict[str, Any]]] = []
        self.contents: list[tuple[Any, Any]] = []
        self.known: set[int] = set()
        for cls in {base for derived in set(classes) for base in derived.__mro__}:
            if not cls.__module__.startswith(("torch.", "builtins", "ctkernels.")):
                self.save(cls, dict(vars(cls)))

    def save_globals(self, namespace: dict[str, Any]) -> None:
        """Saves the globals of a function that is about to run."""
        if id(namespace) not in self.known:
            self.known.add(id(namespace))
            self.save(namespace, dict(namespace))

    def save(self, owner: Any, values: dict[str, Any]) -> None:
        self.saved.append((owner, values))
        self.contents += [(value, value.copy()) for value in values.values() if type(value) in _CONTAINERS]

    def restore(self, is_left: Any) -> None:
        """Restores the entries whose value is a placeholder, according to ``is_left``."""
        for owner, values in self.saved:
            now = owner if isinstance(owner, dict) else vars(owner)
            for name in [name for name, value in list(now.items()) if is_left(value)]:
                if isinstance(owner, dict):
                    owner.pop(name)
                    owner.update({name: values[name]} if name in values else {})
                elif name in values:
                    setattr(owner, name, values[name])
                else:
                    delattr(owner, name)
        for container, values in self.contents:
            if isinstance(container, dict):
                for key in [k for k, v in list(container.items()) if is_left(v) or is_left(k)]:
                    container.pop(key)
                    container.update({key: values[key]} if key in values else {})
            elif any(map(is_left, list(container))):
                container.clear()
                (container.update if isinstance(container, set) else container.extend)(values)


class StandIns:
    """The placeholders of one tracing, none of which may outlive it."""

    def __init__(self) -> None:
        self.refs: list[tuple[weakref.ref[Any], str]] = []

    def watch(self, stand_in: Any, where: str) -> None:
        """``where``: the class of the module in whose forward it is created."""
        self.refs.append((weakref.ref(stand_in), where))

    def alive(self) -> tuple[Any, ...]:
        return tuple(value for ref, _ in self.refs if (value := ref()) is not None)

    def any_alive(self) -> bool:
        for generation in range(3):  # collects reference cycles, the youngest first
            if not self.alive():
                return False
            gc.collect(generation)
        return bool(self.alive())

    def take_back(self, before: Namespaces) -> None:
        """Removes them from wherever they are stored. Raises RuntimeError if that is not possible."""
        before.restore(self._is_left)
        for _ in range(4):
            if not self.any_alive():
                return
            for value in self.alive():
                _remove(value)
            value = None
        if self.any_alive():
            left = self.alive()
            name = next(where for ref, where in self.refs if ref() is not None)
            holders = sorted({type(h).__name__ for v in left for h in gc.get_referrers(v) if h is not left})
            raise RuntimeError(
                f"model: expected a {name} whose forward keeps nothing outside of its modules, got one that keeps tensors "
                f"in a {', '.join(holders) or 'place that Python does not tell'}; the stand-ins with which fuse() reads "
                "code are there now. Clear that cache, and fuse the rest of the model without this module"
            )

    def _is_left(self, value: Any) -> bool:
        ids = {id(v) for v in self.alive()}
        if id(value) in ids:
            return True
        return isinstance(value, (tuple, list)) and any(id(v) in ids for v in value)


def _remove(value: Any, ignored: list[Any] | None = None) -> None:
    """Removes ``value`` from every container that refers to it, directly or through a tuple. ignored: our list of referrers."""
    holders = gc.get_referrers(value)
    for holder in holders:
        if isinstance(holder, functools._lru_cache_wrapper):
            holder.cache_clear()
        elif isinstance(holder, dict):
            for key in [k for k, v in holder.items() if v is value or k is value]:
                del holder[key]
        elif isinstance(holder, set):
            holder.discard(value)
        elif isinstance(holder, (list, deque)) and holder is not ignored:
            kept = [v for v in holder if v is not value]
            if len(kept) < len(holder):
                holder.clear()
                holder.extend(kept)
        elif isinstance(holder, tuple) and ignored is None:
            _remove(holder, holders)
