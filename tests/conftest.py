"""The fixtures of every test."""

from fixtures import backend, memory_given_back, poisoned_memory, pytest_sessionstart  # noqa: F401
