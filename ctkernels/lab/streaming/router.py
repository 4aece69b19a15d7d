"""Choice of an adapter for each prompt: the task with the nearest mean hidden state of the frozen model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..jola.config import Answering
from ..jola.scoring import padded_batches, tail_inputs


class Router:
    """Assigns prompts to the task with the nearest mean of the frozen model's last hidden state, averaged over tokens.

    Distances are in units of the standard deviation within tasks, per dimension. A new task adds its mean and its squared
    deviations; the prompts of earlier tasks are not needed again.

    Args:
        model: a causal language model without adapters.
        tokenizer: of the model.
        answering: maximal length of prompts, and batch size.

    Attributes:
        names: the tasks, in the order in which they were learned.

    Examples:
        >>> router = Router(base, tokenizer)
        >>> router.learn("capitals", ["what is the capital of France", "what is the capital of Spain"])
        >>> router.learn("definitions", ["definition of France", "another definition of Spain"])
        >>> router.route(["what is the capital of Italy", "another definition of Italy"])
        ['capitals', 'definitions']
    """

    def __init__(self, model: Any, tokenizer: Any, answering: Answering | None = None) -> None:
        self.model, self.tokenizer, self.answering = model, tokenizer, answering or Answering()
        self.names: list[str] = []
        self._means: list[Tensor] = []
        self._squares: Tensor | None = None  # within tasks
        self._count = 0

    def learn(self, name: str, prompts: Sequence[str]) -> None:
        """Adds a task, from some of its prompts.

        Raises:
            ValueError: the task is known already, or there are fewer than two prompts.
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
        # a dimension without variance within tasks decides alone, but must differ by more than rounding
        scale = deviation + torch.finfo(torch.float32).eps * torch.stack(self._means).abs().amax(0)
        scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
        distances = torch.cdist(self.features(prompts) / scale, torch.stack(self._means) / scale)
        return [self.names[i] for i in distances.argmin(1).tolist()]

    @torch.inference_mode()
    def features(self, prompts: Sequence[str]) -> Tensor:
        """The mean of the last hidden state over the tokens of each prompt, (prompts, hidden), on the CPU."""
        device, pad = next(self.model.parameters()).device, self.tokenizer.pad_token_id
        rows = [list(self.tokenizer(prompt)["input_ids"])[-self.answering.max_length :] for prompt in prompts]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        means: list[Tensor] = [torch.empty(0)] * len(rows)
        for batch, ids, mask in padded_batches([rows[i] for i in order], pad, self.answering.batch_size, device):
            inputs = tail_inputs(self.model, ids, mask, 1)
            hidden = self.model(**inputs, output_hidden_states=True).hidden_states[-1].float().cpu()
            weights = mask.cpu().unsqueeze(-1).float()
            for i, mean in zip(order[batch], (hidden * weights).sum(1) / weights.sum(1)):
                means[i] = mean
        return torch.stack(means)

    def state(self) -> dict[str, Tensor]:
        """The learned statistics as tensors, without the names of the tasks."""
        if self._squares is None:
            raise ValueError("expected one or more learned tasks, got none")
        return {"means": torch.stack(self._means), "squares": self._squares, "count": torch.tensor(self._count)}

    def load(self, names: Sequence[str], state: Mapping[str, Tensor]) -> None:
        """Loads a state from :meth:`state`.

        Raises:
            ValueError: the state is of another number of tasks.
        """
        if set(state) != {"means", "squares", "count"} or len(names) != len(state["means"]):
            raise ValueError(f"expected the state of a router of {len(names)} tasks, got {sorted(state)}")
        self.names, self._means = list(names), list(state["means"])
        self._squares, self._count = state["squares"], int(state["count"])
