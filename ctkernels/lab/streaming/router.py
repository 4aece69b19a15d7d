"""Choosing an adapter by its input: the task whose prompts are nearest in the frozen model's hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..jola.config import Answering
from ..jola.scoring import padded, tail_inputs


class Router:
    """Assigns prompts to the nearest class mean of the frozen model's last hidden state, averaged over a prompt's tokens.

    Every direction is measured in deviations within tasks, pooled over them. A new task adds its mean and its squares;
    nothing of earlier tasks is needed again.

    Args:
        model: a causal language model without adapters on it.
        tokenizer: of the model.
        how: gives the length of prompts and the batch size.

    Attributes:
        names: the tasks, in the order in which they were learned.

    Examples:
        >>> router = Router(base, tokenizer)
        >>> router.learn("capitals", ["what is the capital of France", "what is the capital of Spain"])
        >>> router.learn("definitions", ["definition of France", "another definition of Spain"])
        >>> router.route(["what is the capital of Italy", "another definition of Italy"])
        ['capitals', 'definitions']
    """

    def __init__(self, model: Any, tokenizer: Any, how: Answering | None = None) -> None:
        self.model, self.tokenizer, self.how = model, tokenizer, how or Answering()
        self.names: list[str] = []
        self._means: list[Tensor] = []
        self._squares: Tensor | None = None  # within tasks
        self._count = 0

    def learn(self, name: str, prompts: Sequence[str]) -> None:
        """Add a task by prompts of it.

        Raises:
            ValueError: it is known already, or there are fewer than two prompts.
        """
        if name in self.names or len(prompts) < 2:
            raise ValueError(f"expected two or more prompts of a new task, got {len(prompts)} of {name!r}")
        features = self.features(prompts)
        mean = features.mean(0)
        squares = (features - mean).square().sum(0)
        self.names.append(name)
        self._means.append(mean)
        self._squares = squares if self._squares is None else self._squares + squares
        self._count += len(prompts) - 1

    def route(self, prompts: Sequence[str]) -> list[str]:
        """The task of each prompt.

        Raises:
            ValueError: no task was learned.
        """
        if self._squares is None:
            raise ValueError("expected one or more learned tasks, got none")
        deviation = (self._squares / self._count).sqrt()
        # a direction that does not vary within tasks decides alone, but not by what rounding makes of it
        scale = deviation + torch.finfo(torch.float32).eps * torch.stack(self._means).abs().amax(0)
        scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
        distances = torch.cdist(self.features(prompts) / scale, torch.stack(self._means) / scale)
        return [self.names[i] for i in distances.argmin(1).tolist()]

    @torch.inference_mode()
    def features(self, prompts: Sequence[str]) -> Tensor:
        """The mean of the last hidden state over each prompt's tokens, (prompts, hidden), on the CPU."""
        device = next(self.model.parameters()).device
        rows = [list(self.tokenizer(prompt)["input_ids"])[-self.how.max_length :] for prompt in prompts]
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for start in range(0, len(order), self.how.batch_size):
            some = order[start : start + self.how.batch_size]
            ids, mask = padded([rows[i] for i in some], self.tokenizer.pad_token_id)
            inputs = tail_inputs(self.model, ids.to(device), mask.to(device), 1)
            hidden = self.model(**inputs, output_hidden_states=True).hidden_states[-1].float().cpu()
            weights = mask.unsqueeze(-1).float()
            for i, mean in zip(some, (hidden * weights).sum(1) / weights.sum(1)):
                found[i] = mean
        return torch.stack(found)

    def state(self) -> dict[str, Tensor]:
        """What was learned, for a file; the names are kept elsewhere."""
        if self._squares is None:
            raise ValueError("expected one or more learned tasks, got none")
        return {"means": torch.stack(self._means), "squares": self._squares, "count": torch.tensor(self._count)}

    def load(self, names: Sequence[str], state: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state` gave.

        Raises:
            ValueError: another number of names than of means.
        """
        if set(state) != {"means", "squares", "count"} or len(names) != len(state["means"]):
            raise ValueError(f"expected the state of a router of {len(names)} tasks, got {sorted(state)}")
        self.names, self._means = list(names), list(state["means"])
        self._squares, self._count = state["squares"], int(state["count"])
