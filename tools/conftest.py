"""The fixtures that tests of the tools share with the library's."""

from fixtures import poisoned_memory  # noqa: F401
