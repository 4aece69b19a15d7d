"""Samples, named calls of public functions for tests and gradient checks; each op has its own in `samples.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Sample:
    """A named call of a public function: ``function(*args, **kwargs)``."""

    name: str
    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """The floating-point tensor arguments, by position or name."""
        named = {str(i): a for i, a in enumerate(self.args)} | self.kwargs
        return {k: v for k, v in named.items() if isinstance(v, Tensor) and v.is_floating_point()}

    def map(self, change: Callable[[str, Tensor], Tensor]) -> Sample:
        """The same call with every floating-point tensor ``t`` named ``k`` replaced by ``change(k, t)``."""

        def swap(k: str, v: Any) -> Any:
            return change(k, v) if isinstance(v, Tensor) and v.is_floating_point() else v

        args = tuple(swap(str(i), a) for i, a in enumerate(self.args))
        return Sample(self.name, self.function, args, {k: swap(k, v) for k, v in self.kwargs.items()})

    def requiring_grad(self) -> Sample:
        """The same call with leaves of the same layout that require gradients."""
        return self.map(lambda _, t: t.detach().requires_grad_())

    def __call__(self) -> Tensor:
        return self.function(*self.args, **self.kwargs)
