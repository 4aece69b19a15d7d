"""The size of each head's edit relative to the head's output, per text: the inputs on which a head acts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class EditReport:
    """Relative edit sizes on texts.

    Attributes:
        texts: the measured texts.
        sites: names of the edited modules, in the model's order.
        sizes: (texts, sites, heads), the mean over a text's tokens of ``|z' - z| / |z|``, with z the head's output before
            and z' after the edit; 0 for a head without an edit, NaN beyond a site's last head.
    """

    texts: tuple[str, ...]
    sites: tuple[str, ...]
    sizes: Tensor

    def mean(self) -> Tensor:
        """Mean over the texts, (sites, heads)."""
        return self.sizes.mean(0)

    def heads(self, count: int = 10) -> list[tuple[str, int]]:
        """The (site, head) pairs with the largest mean, largest first."""
        mean = self.mean().nan_to_num(-1.0)
        order = mean.flatten().argsort(descending=True, stable=True)[:count].tolist()
        pairs = [divmod(i, mean.shape[1]) for i in order]
        return [(self.sites[site], head) for site, head in pairs if mean[site, head] > 0]

    def largest(self, site: str, head: int, count: int = 3) -> list[tuple[str, float]]:
        """The texts on which a head's edit is largest, with its size there, largest first.

        Raises:
            ValueError: the site or head does not exist.
        """
        if site not in self.sites or not 0 <= head < self.sizes.shape[2]:
            raise ValueError(f"site and head must be among {self.sites[:3]}... and 0..{self.sizes.shape[2] - 1}")
        sizes = self.sizes[:, self.sites.index(site), head]
        return [(self.texts[i], float(sizes[i])) for i in sizes.argsort(descending=True, stable=True)[:count].tolist()]

    def text(self, heads: int = 5, texts: int = 2, width: int = 70) -> str:
        """A short table of the heads with the largest edits, and the texts on which each edit is largest and smallest."""
        lines = []
        for site, head in self.heads(heads):
            mean = float(self.sizes[:, self.sites.index(site), head].mean())
            lines.append(f"{site} head {head}: {100 * mean:.1f} % of the head's output on average")
            shown = [*self.largest(site, head, texts), self.largest(site, head, len(self.texts))[-1]]
            for text, size in dict(shown).items():
                short = " ".join(text.split())
                lines.append(f"  {100 * size:7.1f} %  {short if len(short) <= width else short[: width - 1] + '…'}")
        return "\n".join(lines) or "no head is edited"

    def to_dict(self, heads: int = 10, texts: int = 5) -> dict[str, Any]:
        """Values for JSON: the mean of every head, and the texts for the heads with the largest edits."""
        return {
            "sites": list(self.sites),
            "mean": [[round(v, 6) for v in row if v == v] for row in self.mean().tolist()],
            "heads": [
                {
                    "site": site,
                    "head": head,
                    "largest": [{"text": text, "size": size} for text, size in self.largest(site, head, texts)],
                }
                for site, head in self.heads(heads)
            ],
        }


def edit_operands(layer: Any, adapter: str | None = None) -> tuple[Tensor, Tensor]:
    """The `scale` and `offset` of a layer for :func:`relative_sizes`; of the active adapters if none is named."""
    names = [adapter] if adapter else [name for name in layer.active_adapters if name in layer.jola_config]
    p, q = (part.view(layer.num_heads, layer.head_dim) for part in layer.factors(names))
    return p - 1, q


def relative_sizes(z: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """``|scale * z + offset| / |z|``, (..., heads), for z (..., heads, head_dim) and scale, offset that broadcast to it."""
    heads = z.detach().to(scale.dtype)
    edit = torch.linalg.vector_norm(torch.addcmul(offset, heads, scale), dim=-1)
    return edit / torch.linalg.vector_norm(heads, dim=-1).clamp_min(torch.finfo(scale.dtype).tiny ** 0.5)


@torch.no_grad()
def edit_sizes(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], *, batch_size: int = 16, max_length: int = 400
) -> EditReport:
    """Measure how much the active JoLA adapters change each head on each text.

    Args:
        model: a model with a JoLA adapter; runs in evaluation mode and is left unchanged.
        tokenizer: the model's tokenizer.
        texts: the texts to measure.
        batch_size: texts per forward pass. Default 16.
        max_length: tokens per text; longer texts are truncated at the start. Default 400.

    Returns:
        an :class:`EditReport`.

    Raises:
        ValueError: there are no texts, or no active JoLA adapter.

    Examples:
        >>> report = edit_sizes(model, tokenizer, ["a definition", "another"])
        >>> site, head = report.heads(1)[0]
        >>> rows = report.largest(site, head)
    """
    from .gates import log_alphas

    if not texts or isinstance(texts, str):
        raise ValueError("texts must be one or more texts in a list, got " + ("a string" if texts else "none"))
    layers = list({id(layer): layer for layer, *_ in log_alphas(model)}.values())
    if not layers:
        raise ValueError("expected an active JoLA adapter, got none")
    rows = [list(tokenizer(text)["input_ids"])[-max_length:] or [tokenizer.pad_token_id] for text in texts]
    device = next(model.parameters()).device
    sizes = torch.zeros(len(texts), len(layers), max(layer.num_heads for layer in layers))
    for number, layer in enumerate(layers):
        sizes[:, number, layer.num_heads :] = torch.nan
    mask = torch.empty(0)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    batch: list[int] = []

    def measure(number: int, layer: Any) -> Any:
        scale, offset = edit_operands(layer)

        def hook(z: Tensor) -> None:
            by_token = relative_sizes(z.unflatten(-1, scale.shape), scale, offset) * mask.unsqueeze(-1)
            sizes[batch, number, : layer.num_heads] = (by_token.sum(1) / mask.sum(1, keepdim=True)).float().cpu()

        return hook

    training = {module: module.training for module in model.modules()}
    handles = [layer.on_edited(measure(i, layer)) for i, layer in enumerate(layers)]
    try:
        model.eval()
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            width = max(len(rows[i]) for i in batch)
            pad = tokenizer.pad_token_id or 0
            ids = torch.tensor([rows[i] + [pad] * (width - len(rows[i])) for i in batch], device=device)
            mask = torch.tensor([[1.0] * len(rows[i]) + [0.0] * (width - len(rows[i])) for i in batch], device=device)
            model(input_ids=ids, attention_mask=mask.long())
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    return EditReport(tuple(texts), tuple(layer.site for layer in layers), sizes)
