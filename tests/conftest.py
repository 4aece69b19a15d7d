"""The fixtures of every test."""

from fixtures import backend, poisoned_memory, pytest_sessionstart  # noqa: F401
