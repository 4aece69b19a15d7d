"""Bookkeeping of a pool's slots: names, pins, users and order of use."""

from __future__ import annotations

from collections import Counter

BASE_SLOT = 0  # its row has no effect


class PoolFullError(RuntimeError):
    """Raised when every slot of a pool is pinned or in use."""


class Slots:
    """The slots 1 .. capacity. A slot belongs to a name, or to the remaining users of a removed name, or is free.

    Only free slots are written, so that a user of a slot reads the same adapter until its release, whatever happens to the
    name. Not thread-safe: the pool has a lock.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.pinned: set[str] = set()
        self._free = list(range(capacity, 0, -1))
        self._by_name: dict[str, int] = {}  # least recently used first
        self._named: set[int] = set()
        self._users: Counter[int] = Counter()  # of slots in use
        self._adapters: dict[int, str] = {}  # by slot, the last one in it

    @property
    def names(self) -> list[str]:
        """The adapters, least recently used first."""
        return list(self._by_name)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def in_use(self, slot: int) -> bool:
        """Whether a slot has users."""
        return slot in self._users

    def adapters_in_use(self) -> dict[int, str]:
        """The adapters of slots in use, by slot."""
        return {slot: self._adapters[slot] for slot in self._users}

    def acquire(self, name: str) -> int:
        """Adds a user to an adapter's slot, makes it the most recently used, and returns it."""
        slot = self._by_name.pop(name)
        self._by_name[name] = slot
        self._users[slot] += 1
        return slot

    def release(self, slot: int) -> None:
        """Removes a user. The last user of a removed adapter frees the slot.

        Raises:
            ValueError: the slot has no user.
        """
        if not self.in_use(slot):
            raise ValueError(f"slot: expected one that was acquired and not released since, got {slot!r}")
        self._users[slot] -= 1
        if not self._users[slot]:
            del self._users[slot]
        self._free_if_unused(slot)

    def reserve(self, name: str) -> tuple[int, str | None]:
        """Reserves a free slot for a new version of `name`; without one, evicts the least recently used adapter.

        Returns:
            The slot, which the caller fills and passes to `publish`, or back to `put_back`; and the evicted adapter.

        Raises:
            PoolFullError: every adapter is pinned or in use.
        """
        if self._free:
            return self._free.pop(), None
        idle = [key for key, slot in self._by_name.items() if not self.in_use(slot)]
        evictable = [key for key in idle if key == name or key not in self.pinned]
        if not evictable:
            raise PoolFullError(
                f"no slot for adapter {name!r}: of {self.capacity} adapters, {len(self.pinned)} are pinned and "
                f"{len(self._users)} in use; unpin or wait, or make the pool with a larger "
                "capacity"
            )
        victim = name if name in evictable else evictable[0]
        self._drop(victim)
        return self._free.pop(), victim if victim != name else None

    def put_back(self, slot: int) -> None:
        """Returns a reserved slot."""
        self._free.append(slot)

    def publish(self, name: str, slot: int) -> None:
        """Assigns a filled slot to `name`. Its previous slot is free once it has no users."""
        if name in self._by_name:
            self._drop(name)
        self._by_name[name] = slot
        self._named.add(slot)
        self._adapters[slot] = name

    def evict(self, name: str) -> None:
        """Removes an adapter. Its slot is free once it has no users."""
        self._drop(name)

    def _drop(self, name: str) -> None:
        slot = self._by_name.pop(name)
        self._named.remove(slot)
        self._free_if_unused(slot)

    def _free_if_unused(self, slot: int) -> None:
        if not self.in_use(slot) and slot not in self._named:
            self._free.append(slot)
