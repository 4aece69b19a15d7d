"""DeepSpeed ZeRO-1 and 2 through transformers' Trainer, the penalty in the loss.

    torchrun --nproc-per-node 2 examples/trainers/deepspeed_zero.py      # on a CPU as well

DeepSpeed steps within its backward pass and keeps gradients of its own, so that a callback cannot add the penalty's; the loss
can. ZeRO-3 is refused: it gathers the parameters of a module when the module is called, which lists of parameters, as adapters
have them, never are. On a CPU, DeepSpeed compiles a module when it is first used.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2]))

from peft import get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from ctkernels.adapters import JointConfig, jola_penalty, measure_units
from examples.trainers import tiny


class PenaltyTrainer(Trainer):
    """A Trainer whose loss has the penalty on gates."""

    penalty = 0.1

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **more)
        if model.training:
            loss = loss + self.penalty * jola_penalty(model)
        return (loss, outputs) if return_outputs else loss


def train(
    model: Any, tokenizer: Any, rows: list[dict[str, list[int]]], out: str, stage: int = 2, **options: Any
) -> Trainer:
    """Train on rows of tokens under ZeRO-1 or 2."""
    if stage not in (1, 2):
        raise ValueError(f"stage must be 1 or 2, got {stage}: ZeRO-3 does not gather an adapter's parameters")
    adapted = get_peft_model(model, JointConfig(task_type="CAUSAL_LM"))
    collate = DataCollatorForSeq2Seq(tokenizer)
    measure_units(adapted, [collate([dict(row) for row in rows[:64]])])
    zero = {
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    arguments = TrainingArguments(
        out,
        learning_rate=0.05,
        adam_epsilon=1e-6,
        per_device_train_batch_size=8,
        report_to=[],
        logging_steps=1,
        deepspeed=zero,
        **options,
    )
    trainer = PenaltyTrainer(adapted, arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    model, tokenizer = tiny.load()
    trainer = train(model, tokenizer, tiny.rows(tokenizer), "out/deepspeed_zero", num_train_epochs=5)
    print([round(entry["loss"], 3) for entry in trainer.state.log_history if "loss" in entry])
