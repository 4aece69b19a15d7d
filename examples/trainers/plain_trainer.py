"""transformers' Trainer, with rates of their own for edits, gates and curvature.

python examples/trainers/plain_trainer.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2]))

import torch
from peft import get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from ctkernels.adapters import JointConfig, JolaPenaltyCallback, measure_units, parameter_groups
from examples.trainers import tiny


def train(model: Any, tokenizer: Any, rows: list[dict[str, list[int]]], out: str, **options: Any) -> Trainer:
    """Train on rows of tokens."""
    adapted = get_peft_model(model, JointConfig(task_type="CAUSAL_LM"))
    collate = DataCollatorForSeq2Seq(tokenizer)
    measure_units(adapted, [collate([dict(row) for row in rows[:64]])])  # before parameter_groups, whose rates go by it
    groups = parameter_groups(adapted, lr=0.05, gate_lr=0.5, curvature_lr=0.1)
    trainer = Trainer(
        adapted,
        TrainingArguments(out, per_device_train_batch_size=8, report_to=[], logging_steps=1, **options),
        train_dataset=rows,
        data_collator=collate,
        callbacks=[JolaPenaltyCallback("constant")],
        optimizers=(torch.optim.AdamW(groups, eps=1e-6), None),
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    model, tokenizer = tiny.load()
    trainer = train(model, tokenizer, tiny.rows(tokenizer), "out/plain_trainer", num_train_epochs=5)
    print([round(entry["loss"], 3) for entry in trainer.state.log_history if "loss" in entry])
