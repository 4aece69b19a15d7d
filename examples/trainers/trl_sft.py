"""TRL's SFTTrainer: `peft_config` and one callback are all that JoLA and Curvature Tuning need.

    python examples/trainers/trl_sft.py

The callback measures the heads, so that one learning rate suits all of them, and puts the penalty on the gates. Everything is in
one optimizer group: gates carry their rate in how they are stored.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2]))

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from ctkernels.adapters import JointConfig, JolaPenaltyCallback
from examples.trainers import tiny


def train(model: Any, tokenizer: Any, data: list[dict[str, str]], out: str, **options: Any) -> SFTTrainer:
    """Train on prompts and completions; the adapter is in `trainer.model`, and in `out`."""
    arguments = SFTConfig(
        out,
        learning_rate=0.05,
        adam_epsilon=1e-6,
        per_device_train_batch_size=8,
        report_to=[],
        logging_steps=1,
        **options,
    )
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        peft_config=JointConfig(task_type="CAUSAL_LM"),
        callbacks=[JolaPenaltyCallback("constant")],
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    trainer = train(*tiny.load(), tiny.prompts(), "out/trl_sft", num_train_epochs=5)
    print([round(entry["loss"], 3) for entry in trainer.state.log_history if "loss" in entry])
