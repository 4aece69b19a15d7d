"""A loop on accelerate: one process or many (`accelerate launch`), the same lines.

python examples/trainers/accelerate_loop.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2]))

import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq

from ctkernels.adapters import JointConfig, jola_penalty, measure_units, parameter_groups, save_adapter
from examples.trainers import tiny


def train(
    model: Any, tokenizer: Any, rows: list[dict[str, list[int]]], out: str, epochs: int = 5, cpu: bool = False
) -> tuple[Any, list[float]]:
    """Train on rows of tokens. Returns the adapted model, and the loss of every step without the penalty."""
    accelerator = Accelerator(cpu=cpu)
    adapted = get_peft_model(model, JointConfig(task_type="CAUSAL_LM"))
    collate = DataCollatorForSeq2Seq(tokenizer)
    measure_units(adapted, [collate([dict(row) for row in rows[:64]])])
    optimizer = torch.optim.AdamW(parameter_groups(adapted, lr=0.05), eps=1e-6)
    loader = DataLoader(
        rows, batch_size=8, shuffle=True, collate_fn=collate, generator=torch.Generator().manual_seed(0)
    )  # type: ignore[arg-type]
    wrapped, optimizer, loader = accelerator.prepare(adapted.train(), optimizer, loader)
    losses = []
    for _ in range(epochs):
        for batch in loader:
            loss = wrapped(**batch).loss
            accelerator.backward(loss + 0.1 * jola_penalty(wrapped))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    if accelerator.is_main_process:
        save_adapter(accelerator.unwrap_model(wrapped), out)
    accelerator.wait_for_everyone()
    return accelerator.unwrap_model(wrapped), losses


if __name__ == "__main__":
    model, tokenizer = tiny.load()
    _, losses = train(model, tokenizer, tiny.rows(tokenizer), "out/accelerate_loop")
    print([round(loss, 3) for loss in losses])
