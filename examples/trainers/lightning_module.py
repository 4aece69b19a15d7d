"""Lightning: the adapted model in a LightningModule, whose checkpoints hold the adapter alone.

python examples/trainers/lightning_module.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2]))

import lightning
import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq

from ctkernels.adapters import JointConfig, jola_penalty, measure_units, parameter_groups, save_adapter
from examples.trainers import tiny


class Adapted(lightning.LightningModule):
    """A language model with an adapter of JoLA and Curvature Tuning."""

    def __init__(self, model: Any, lr: float = 0.05, penalty: float = 0.1) -> None:
        super().__init__()
        self.model = get_peft_model(model, JointConfig(task_type="CAUSAL_LM"))
        self.lr, self.penalty = lr, penalty
        self.strict_loading = False  # what a checkpoint lacks is the model that the adapter is put on
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        """The loss, and the penalty on gates."""
        loss = self.model(**batch).loss
        self.losses.append(float(loss.detach()))
        return loss + self.penalty * jola_penalty(self.model)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, with rates for each kind of parameter."""
        return torch.optim.AdamW(parameter_groups(self.model, lr=self.lr), eps=1e-6)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the adapter alone."""
        checkpoint["state_dict"] = get_peft_model_state_dict(self.model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the adapter back."""
        set_peft_model_state_dict(self.model, checkpoint["state_dict"])
        checkpoint["state_dict"] = {}


def train(model: Any, tokenizer: Any, rows: list[dict[str, list[int]]], out: str, **options: Any) -> Adapted:
    """Train on rows of tokens; the adapter goes to `out`."""
    module, collate = Adapted(model), DataCollatorForSeq2Seq(tokenizer)
    measure_units(module.model, [collate([dict(row) for row in rows[:64]])])
    trainer = lightning.Trainer(
        default_root_dir=out, logger=False, enable_progress_bar=False, enable_model_summary=False, **options
    )
    trainer.fit(module, DataLoader(rows, batch_size=8, shuffle=True, collate_fn=collate))  # type: ignore[arg-type]
    save_adapter(module.model, out)
    return module


if __name__ == "__main__":
    model, tokenizer = tiny.load()
    module = train(model, tokenizer, tiny.rows(tokenizer), "out/lightning_module", max_epochs=5)
    print([round(loss, 3) for loss in module.losses])
