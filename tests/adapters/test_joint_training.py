"""Training a joint adapter: the rates of its methods, units, the penalty, a plain loop and the Trainer."""

from __future__ import annotations

import pytest
import torch
from jola_families import build, inputs, output
from test_joint import config

peft = pytest.importorskip("peft", minversion="0.21")
transformers = pytest.importorskip("transformers")
adapters = pytest.importorskip("ctkernels.adapters")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
METHODS = ("jola_m", "jola_a", "jola_log_alpha", "curvature_raw", "lora_")


def _model(**values):
    torch.manual_seed(3)
    return peft.get_peft_model(build("llama"), config(lora=["q_proj", "o_proj"], **values)).train()


def _moved(before, model):
    after = model.state_dict()
    return {part for part in METHODS for name in before if part in name and not torch.equal(before[name], after[name])}


def test_every_method_has_its_rate():
    model = _model(modules_to_save=["lm_head"])
    rates = {group["name"]: (group["lr"], len(group["params"])) for group in adapters.parameter_groups(model)}
    assert rates == {
        "jola_edits": (5e-3, 4),
        "jola_gates": (5e-3, 4),  # in units of a tenth of log alpha
        "curvature": (0.1, 4),
        "lora": (1e-3, 8),
        "rest": (1e-3, 1),
    }
    adapters.measure_units(model, [inputs("llama")])
    rates = {group["name"]: group["lr"] for group in adapters.parameter_groups(model)}
    assert [rates[name] for name in ("jola_edits", "lora", "rest")] == [5e-2, 1e-3, 1e-3]
    rates = {group["name"]: group["lr"] for group in adapters.parameter_groups(model, lr=2e-3, curvature_lr=0.03)}
    assert rates == {"jola_edits": 2e-3, "jola_gates": 2e-3, "curvature": 0.03, "lora": 2e-3, "rest": 2e-3}


def test_units_are_measured_behind_the_curvature_and_change_nothing():
    model, values = _model(), inputs("llama")
    model.eval()
    before = output(model, values)
    sizes = adapters.measure_units(model, [values])
    torch.testing.assert_close(output(model, values), before, rtol=1e-5, atol=1e-5)
    z = {}
    for layer in (module for module in model.modules() if isinstance(module, adapters.JolaLayer)):
        layer.register_forward_pre_hook(lambda layer, args: z.__setitem__(layer.site, args[0]))
        layer.set_adapter([])  # LoRA and the units below stay
    output(model, values)
    for site, size in sizes.items():
        rms = z[site].unflatten(-1, (4, 8)).square().mean((0, 1, 3)).sqrt()
        torch.testing.assert_close(torch.tensor(size), rms)


def test_a_plain_loop_trains_every_method_and_closes_gates():
    model, values = _model(), inputs("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(adapters.parameter_groups(model, gate_lr=0.5), eps=1e-6)
    losses = []
    for _ in range(20):
        loss = model(**values, labels=values["input_ids"]).loss
        (loss + 0.5 * adapters.jola_penalty(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert min(losses[-5:]) < 0.7 * losses[0]
    assert _moved(before, model) == set(METHODS)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items() if "default" not in name)
    opened = adapters.open_heads(model)
    assert sum(len(heads) for parts in opened.values() for heads in parts.values()) < 16


def test_the_trainer_trains_saves_and_resumes(tmp_path):
    data = [{"input_ids": row, "labels": row} for row in torch.randint(3, 64, (16, 6)).tolist()]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=4,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        logging_steps=1,
    )

    def trainer(model):
        optimizer = torch.optim.AdamW(adapters.parameter_groups(model, lr=5e-3), eps=1e-6)
        return transformers.Trainer(
            model,
            arguments,
            train_dataset=data,
            callbacks=[adapters.JolaPenaltyCallback("constant")],
            optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
            data_collator=transformers.default_data_collator,
        )

    model = _model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer(model).train()
    assert _moved(before, model) == set(METHODS)
    again = _model()
    trainer(again).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    loaded = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "checkpoint-4").eval()
    assert torch.equal(output(loaded, inputs("llama")), output(model.eval(), inputs("llama")))
