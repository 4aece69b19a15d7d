"""TRL's DPOTrainer: the reference is the model with its adapter switched off, so it takes no memory.

    python examples/trainers/trl_dpo.py

Give the plain model and `peft_config`: of a model that has an adapter already, TRL makes the reference from a copy of that
adapter, whose gates would be drawn at random in training.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2]))

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from ctkernels.adapters import JointConfig, JolaPenaltyCallback, measure_units
from examples.trainers import tiny


def train(model: Any, tokenizer: Any, data: list[dict[str, str]], out: str, **options: Any) -> DPOTrainer:
    """Train on prompts with a chosen and a rejected completion."""
    arguments = DPOConfig(
        out,
        learning_rate=0.05,
        adam_epsilon=1e-6,
        per_device_train_batch_size=8,
        report_to=[],
        logging_steps=1,
        **options,
    )
    trainer = DPOTrainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        peft_config=JointConfig(task_type="CAUSAL_LM"),
        callbacks=[JolaPenaltyCallback("constant", units=0)],
    )
    # a batch of DPO is no input of the model, so the heads are measured here
    texts = [row["prompt"] + row["chosen"] for row in data[:64]]
    measure_units(trainer.model, [tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)])
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    trainer = train(*tiny.load(), tiny.preferences(), "out/trl_dpo", num_train_epochs=5)
    print([round(entry["loss"], 3) for entry in trainer.state.log_history if "loss" in entry])
