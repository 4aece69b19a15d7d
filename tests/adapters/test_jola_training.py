"""Training: gradients, checkpointing, accumulation, the penalty and its schedules, parameter groups, the Trainer."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch
from jola_families import FAMILIES, build, inputs
from torch.utils._python_dispatch import TorchDispatchMode

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
adapters = pytest.importorskip("ctkernels.adapters")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
GATE_RATE = 10.0  # the default
TOKENS = inputs("llama", batch=4)["input_ids"]


def _model(name="llama", log_alpha=0.5, **values):
    task = "CAUSAL_LM" if FAMILIES[name].head == "causal" else None
    config = adapters.JolaConfig(task_type=task, init_std=0.3, init_log_alpha=log_alpha, **values)
    model = build(name)
    torch.manual_seed(2)
    return peft.get_peft_model(model, config).train()


def _grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def _logs(model):
    return [p for name, p in model.named_parameters() if "jola_log_alpha" in name]


def _loss(model, tokens):
    return model(input_ids=tokens, labels=tokens).loss


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_checkpointing_gives_the_same_gradients(name, reentrant):
    grads = []
    for checkpointing in (False, True):
        model = _model(name)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(9)
        # two forwards before the backward: each must be computed again with its own gate sample
        loss = _loss(model, TOKENS[:2]) + _loss(model, TOKENS[2:])
        loss.backward()
        grads.append(_grads(model))
    assert grads[0].keys() == grads[1].keys()
    for key, grad in grads[0].items():
        # the gates' samples are the same bits; sums over T5's encoder output may run in another order
        torch.testing.assert_close(
            grads[1][key], grad, rtol=1e-5 if name == "t5" else 0, atol=1e-6 if name == "t5" else 0
        )
    assert all(grad.abs().sum() > 0 for key, grad in grads[0].items() if "log_alpha" not in key)


def test_accumulation_gives_the_same_gradients():
    grads = []
    for parts in (1, 2):
        model = _model(freeze_gates=True)
        for tokens in TOKENS.chunk(parts):
            (_loss(model, tokens) / parts).backward()
        grads.append(_grads(model))
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-4, atol=1e-6)


def test_gradients_agree_with_finite_differences():
    model = _model("gpt2", log_alpha=0.4).double().eval()  # Llama's norms compute in fp32

    def value():
        logits = model(TOKENS).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())

    value().backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                original = parameter.clone()
                values = []
                for sign in (1, -1):
                    parameter.copy_(original)
                    parameter.view(-1)[0] += sign * 1e-5
                    values.append(value())
                parameter.copy_(original)
            numeric = (values[0] - values[1]) / 2e-5
            torch.testing.assert_close(parameter.grad.view(-1)[0], numeric, rtol=1e-4, atol=1e-8)


def _probability(log_alpha):
    return torch.sigmoid(log_alpha + 0.33 * math.log(1.1 / 0.1))


def test_the_penalty_is_the_mean_probability_of_an_open_gate():
    model = _model()
    with torch.no_grad():
        for parameter in _logs(model):
            parameter.copy_(torch.randn_like(parameter))
    flat = torch.cat([p.detach() for p in _logs(model)])
    expected = _probability(GATE_RATE * flat)
    torch.testing.assert_close(adapters.jola_penalty(model), expected.mean())
    torch.testing.assert_close(adapters.jola_penalty(model, reduction="sum"), expected.sum())
    (3 * adapters.jola_penalty(model)).backward()
    grads = torch.cat([p.grad for p in _logs(model)])
    torch.testing.assert_close(grads, 3 * GATE_RATE * expected * (1 - expected) / flat.numel())
    model.zero_grad()
    for _ in range(2):
        adapters.add_penalty_grad(model, 1.5)
    torch.testing.assert_close(torch.cat([p.grad for p in _logs(model)]), grads)


def test_the_official_penalty_has_its_two_weights():
    model = _model()
    m, a = (
        torch.stack(
            [_probability(GATE_RATE * p.detach()) for n, p in model.named_parameters() if f"log_alpha_{kind}" in n]
        )
        for kind in "ma"
    )
    # sums over layers of the means over heads, each divided by layers * heads
    expected = (0.1 * a.mean(1).sum() + 0.9 * m.mean(1).sum()) / (2 * 4)
    torch.testing.assert_close(adapters.official_penalty(model, 0.1), expected)


def test_penalty_arguments_are_checked():
    model = _model()
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', got 'max'"):
        adapters.jola_penalty(model, reduction="max")
    with pytest.raises(ValueError, match=r"adapter must be one of \['default'\], got 'other'"):
        adapters.jola_penalty(model, "other")
    with pytest.raises(ValueError, match="expected a model with a JoLA adapter"):
        adapters.jola_penalty(build("llama"))
    with pytest.raises(ValueError, match=r"schedule must be one of .*, got 'square'"):
        adapters.JolaPenaltyCallback("square")
    with pytest.raises(ValueError, match="penalty must be 'paper' or 'official', got 'both'"):
        adapters.JolaPenaltyCallback(penalty="both")
    with pytest.raises(ValueError, match="period must be at least 1, got 0"):
        adapters.CyclicSchedule(period=0)


def test_schedules():
    assert [adapters.ConstantSchedule(0.3)(step, 10) for step in (0, 7)] == [0.3, 0.3]
    assert [adapters.LinearSchedule()(step, 10) for step in (0, 5, 10, 20)] == pytest.approx([0, 0.1, 0.2, 0.2])
    assert [adapters.CyclicSchedule()(step) for step in (0, 5, 10, 15)] == pytest.approx([0.5, 1, 0.5, 0])
    assert [adapters.ExponentialSchedule()(step) for step in (0, 100)] == pytest.approx([0.1, 0.1 / math.e])
    adaptive = adapters.AdaptiveSchedule()
    weights = []
    for loss in (2.0, 1.5, 1.6, 1.6, 1.0):
        adaptive.update(loss)
        weights.append(adaptive(0, 1))
    assert weights == pytest.approx([0.1, 0.11, 0.1, 0.1, 0.11])
    accuracy = adapters.AdaptiveSchedule(start=0.0, metric="eval_accuracy", greater_is_better=True)
    accuracy.update(0.5)
    accuracy.update(0.4)
    assert accuracy(0) == 0.0  # bounded below


class _Reads(TorchDispatchMode):
    """Counts the reads of a tensor's value by the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_training_step_reads_nothing_back():
    model = _model()
    callback = adapters.JolaPenaltyCallback("exponential")
    state = transformers.TrainerState(global_step=3, max_steps=10)
    hidden = torch.randn(2, 3, 32)
    layer = next(m for m in model.modules() if isinstance(m, adapters.JolaLayer))
    with _Reads() as reads:
        layer(hidden).sum().backward()
        callback.on_pre_optimizer_step(None, state, None, model=model)
        adapters.jola_penalty(model).backward()
    assert reads.count == 0


def test_parameter_groups():
    model = _model()
    model.get_input_embeddings().weight.requires_grad_(True)
    groups = {group["name"]: group for group in adapters.parameter_groups(model, lr=1e-3, weight_decay=0.1)}
    assert [(name, g["lr"], g["weight_decay"], len(g["params"])) for name, g in groups.items()] == [
        ("jola_edits", 1e-3, 0.1, 4),
        ("jola_gates", 1e-3, 0.0, 4),  # of a parameter that is a tenth of log alpha
        ("rest", 1e-3, 0.1, 1),
    ]
    adapters.freeze_gates(model)
    assert [group["name"] for group in adapters.parameter_groups(model, gate_lr=1.0)] == ["jola_edits", "rest"]


def test_gates_close_with_their_own_rate_but_not_with_the_released_one():
    for gate_lr, closes in ((5e-3, False), (5e-2, True)):
        model = _model(log_alpha=2.5)
        optimizer = torch.optim.Adam(adapters.parameter_groups(model, lr=5e-3, gate_lr=gate_lr))
        for _ in range(150):
            adapters.add_penalty_grad(model, 0.1)
            optimizer.step()
            optimizer.zero_grad()
        kept = adapters.open_heads(model)
        assert all(not heads for parts in kept.values() for heads in parts.values()) is closes


class _Data(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        tokens = TOKENS[index % 4]
        return {"input_ids": tokens, "labels": tokens}


def _train(folder, schedule, **options):
    model = _model()
    callback = adapters.JolaPenaltyCallback(schedule)
    weights = []
    inner = callback.schedule

    def record(step, total):
        weights.append((step, total, inner(step, total)))
        return weights[-1][-1]

    if hasattr(inner, "update"):
        record.update, record.metric = inner.update, inner.metric
    callback.schedule = record
    optimizer = torch.optim.AdamW(adapters.parameter_groups(model, lr=1e-3, gate_lr=0.3))
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        lr_scheduler_type="constant",
        **{"save_strategy": "no"} | options,
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=_Data(),
        eval_dataset=_Data(),
        callbacks=[callback],
        optimizers=(optimizer, None),
    )
    trainer.train()
    return model, weights, trainer


def test_the_trainer_callback_runs_once_a_step_and_closes_gates(tmp_path):
    model, weights, _ = _train(tmp_path, adapters.ConstantSchedule(50.0), max_steps=15, gradient_accumulation_steps=2)
    assert [step for step, _, _ in weights] == list(range(15))
    assert {total for _, total, _ in weights} == {15}
    kept = adapters.open_heads(model)
    assert sum(len(heads) for parts in kept.values() for heads in parts.values()) < 8


def test_the_adaptive_schedule_follows_evaluation(tmp_path):
    _, weights, trainer = _train(tmp_path, "adaptive", max_steps=4, eval_strategy="steps", eval_steps=1)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    expected = [0.1, 0.1]
    for before, after in itertools.pairwise(losses[:3]):
        expected.append(expected[-1] + (0.01 if after < before else -0.01))
    assert [weight for _, _, weight in weights] == pytest.approx(expected)


def test_the_trainer_resumes_from_a_checkpoint(tmp_path):
    _, _, trainer = _train(tmp_path, "exponential", max_steps=4, save_strategy="steps", save_steps=2)
    whole = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if ".jola_" in name}
    model = _model()
    optimizer = torch.optim.AdamW(adapters.parameter_groups(model, lr=1e-3, gate_lr=0.3))
    again = transformers.Trainer(
        model,
        trainer.args,
        train_dataset=_Data(),
        callbacks=[adapters.JolaPenaltyCallback("exponential")],
        optimizers=(optimizer, None),
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, parameter in model.named_parameters():
        if ".jola_" in name:
            assert torch.equal(parameter, whole[name]), name


def test_fp16_without_clipping_is_refused():
    arguments = transformers.TrainingArguments(output_dir="unused", report_to=[], max_grad_norm=0.0)
    arguments.fp16 = True
    with pytest.raises(ValueError, match="fp16 needs max_grad_norm"):
        adapters.JolaPenaltyCallback().on_train_begin(arguments, None, None)


def test_deepspeed_is_refused():
    """It steps within its backward pass, so that what the callback adds to gradients would be lost."""
    arguments = transformers.TrainingArguments(output_dir="unused", report_to=[])
    arguments.deepspeed_plugin = object()
    with pytest.raises(ValueError, match="cannot add a gradient under DeepSpeed"):
        adapters.JolaPenaltyCallback().on_train_begin(arguments, None, None)


@pytest.mark.parametrize("sampled", [False, True])
def test_compiles_without_graph_breaks(sampled):
    model = _model(freeze_gates=not sampled)
    layer = next(m for m in model.modules() if isinstance(m, adapters.JolaLayer))
    z = torch.randn(2, 3, 32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for module in (layer, compiled):
        torch.manual_seed(4)
        results.append(module(z))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("soft", [False, True])
def test_a_log_alpha_has_a_gradient_unless_its_sampled_gate_is_clipped(soft, monkeypatch):
    """So a step may leave log alphas as they are: most gates sample 1 exactly, and of those the gradient is zero.

    Tests that expect every parameter to change at every step, or the same parameters to have gradients in two runs
    with other samples, find that with the gates of the paper, and do not with gates whose samples are never clipped.
    """
    layer_module = sys.modules[adapters.JolaLayer.__module__]
    sampled, function = [], layer_module.hard_concrete

    def recorded(*args, **kwargs):
        sampled.append(function(*args, **kwargs))
        return sampled[-1]

    monkeypatch.setattr(layer_module, "hard_concrete", recorded)
    values = {"temperature": 5.0, "stretch": (-1e-4, 1.0001)} if soft else {}
    model = peft.get_peft_model(build("llama"), adapters.JolaConfig(init_std=0.5, **values)).train()
    values, clipped, count = inputs("llama"), 0, 0  # making inputs seeds the generator
    for _ in range(10):
        sampled.clear()
        model.zero_grad()
        model(**values).logits.square().mean().backward()
        layers = [module for module in model.modules() if isinstance(module, adapters.JolaLayer)]
        assert len(sampled) == len(layers)
        for layer, gates in zip(layers, sampled):
            grads = torch.cat([layer.jola_log_alpha_m["default"].grad, layer.jola_log_alpha_a["default"].grad])
            is_clipped = (gates == 0) | (gates == 1)
            assert torch.equal(grads == 0, is_clipped)
            clipped, count = clipped + int(is_clipped.sum()), count + len(gates)
    # P(the stretched sigmoid reaches 1) = sigmoid(log alpha - temperature * log(11)); 5 standard deviations of 160 gates
    expected = 0.0 if soft else torch.sigmoid(torch.tensor(2.5 - 0.33 * math.log(11))).item()
    assert abs(clipped / count - expected) <= 5 * math.sqrt(expected * (1 - expected) / count)
