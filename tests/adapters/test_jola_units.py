"""Units of JoLA's parameters: measured on batches, kept in the adapter's file, the same function in any of them."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from jola_families import build, inputs, output
from two_processes import run_in_two

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
adapters = pytest.importorskip("ctkernels.adapters")
safetensors = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
VALUES = inputs("llama", batch=3)
EPS = torch.finfo(torch.float32).eps


def _model(name="llama", init_std=0.3, log_alpha=0.4, **values):
    model = build(name)
    torch.manual_seed(4)
    return peft.get_peft_model(model, adapters.JolaConfig(init_std=init_std, init_log_alpha=log_alpha, **values)).eval()


def _layers(model):
    return [module for module in model.modules() if isinstance(module, adapters.JolaLayer)]


def _heads_by_hand(model, batches):
    """RMS of the plain model's heads over the tokens of some batches, by layer."""
    seen = [[] for _ in _layers(model)]
    hooks = [
        layer.base_layer.register_forward_pre_hook(
            lambda _, args, kept=kept, size=layer.head_dim: kept.append(args[0].detach().unflatten(-1, (-1, size)))
        )
        for layer, kept in zip(_layers(model), seen)
    ]
    with model.disable_adapter(), torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return [torch.cat([z.flatten(0, 1) for z in kept]).double().square().mean((0, 2)).sqrt() for kept in seen]


def test_units_are_the_rms_of_each_head_and_leave_the_function_alone():
    model = _model()
    before = output(model, VALUES)
    expected = _heads_by_hand(model, [VALUES, VALUES])
    found = adapters.measure_units(model.train(), iter([VALUES, VALUES]))
    assert model.training
    assert list(found) == [layer.site for layer in _layers(model)]
    for layer, rms in zip(_layers(model), expected):
        unit = layer.jola_unit_a["default"]
        torch.testing.assert_close(unit.double(), rms, rtol=4 * EPS, atol=0)
        assert found[layer.site] == unit.tolist()
        assert unit.std() > 0.05 * unit.mean()
    # a was divided by its unit and is multiplied again: two roundings, of numbers that the model then carries on
    torch.testing.assert_close(output(model.eval(), VALUES), before, rtol=1e-5, atol=1e-5)


def test_measuring_again_changes_no_bit():
    model = _model()
    adapters.measure_units(model, [VALUES])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapters.measure_units(model, [VALUES])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_padding_does_not_count_and_every_kind_of_batch_is_taken():
    model, tokens = _model(), VALUES["input_ids"]
    expected = adapters.measure_units(model, [{"input_ids": tokens[:, :4]}])
    padded = torch.cat([torch.full_like(tokens[:, :3], 1), tokens[:, :4]], 1)
    mask = torch.cat([torch.zeros_like(tokens[:, :3]), torch.ones_like(tokens[:, :4])], 1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    batch = {"input_ids": padded, "attention_mask": mask, "position_ids": positions}
    for batches in ([batch], [tokens[:, :4]], [(tokens[:, :4],)], [{"input_ids": tokens[:1, :4]}, tokens[1:, :4]]):
        found = adapters.measure_units(model, batches)
        for site, units in expected.items():
            assert found[site] == pytest.approx(units, rel=1e-5)


@pytest.mark.parametrize("heads", [None, {0: [1, 3], 1: {"m": [0], "a": [2]}}])
def test_files_merging_mixing_and_monitors_are_exact_with_units(heads, tmp_path):
    model = _model(heads=heads)
    adapters.measure_units(model, [VALUES])
    edited = output(model, VALUES)
    model.save_pretrained(tmp_path / "adapter")
    names = safetensors.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(".jola_unit_a" in name for name in names) == sum(".jola_unit_log_alpha" in name for name in names) == 2
    again = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "adapter").eval()
    assert torch.equal(output(again, VALUES), edited)
    light = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "adapter", low_cpu_mem_usage=True).eval()
    assert torch.equal(output(light, VALUES), edited)
    plain = build("llama")
    plain.load_adapter(tmp_path / "adapter")
    assert torch.equal(output(plain.eval(), VALUES), edited)
    assert torch.equal(output(copy.deepcopy(model), VALUES), edited)

    again.add_adapter("second", adapters.JolaConfig(init_std=0.5))
    with torch.no_grad():
        mixed = again(**VALUES, adapter_names=["default", "second", "__base__"]).logits
    torch.testing.assert_close(mixed[0], edited[0], rtol=1e-5, atol=1e-5)

    layer = _layers(model)[0]
    z = torch.randn(2, 3, 32)
    p, q = layer.factors(["default"])
    torch.testing.assert_close(layer.edit(z, "default"), p * z + q, rtol=1e-5, atol=1e-6)

    bits = [value.clone() for value in model.base_model.model.state_dict().values()]
    model.merge_adapter()
    torch.testing.assert_close(output(model, VALUES), edited, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert all(torch.equal(a, b) for a, b in zip(bits, model.base_model.model.state_dict().values()))
    adapters.save_merged(model, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(output(merged, VALUES), edited, rtol=1e-4, atol=1e-4)


def test_dropping_heads_drops_their_units(tmp_path):
    model = _model()
    adapters.measure_units(model, [VALUES])
    with torch.no_grad():
        first, second = _layers(model)
        first.jola_log_alpha_a["default"].copy_(torch.tensor([2.0, -9.0, 2.0, -9.0]))
        for table in (second.jola_log_alpha_a, second.jola_log_alpha_m):
            table["default"].fill_(-9.0)
    kept, edited = first.jola_unit_a["default"][[0, 2]], output(model, VALUES)
    assert adapters.drop_closed_heads(model) == 10
    assert torch.equal(first.jola_unit_a["default"], kept)
    assert "default" not in second.jola_unit_a
    assert "default" not in second.jola_unit_log_alpha
    torch.testing.assert_close(output(model, VALUES), edited, rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    assert torch.equal(output(again, VALUES), edited)


# --- what was saved before there were units -----------------------------------------------------------------------


def _as_before(folder, **values):
    """A saved adapter as it was before units: log alpha and a themselves, and nothing about gate_rate."""
    model = _model(gate_rate=1.0, **values)
    edited = output(model, VALUES)
    model.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    tensors = {k: v for k, v in safetensors.load_file(file).items() if "jola_unit" not in k}
    safetensors.save_file(tensors, file, {"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["gate_rate"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return edited, tensors


def test_an_old_file_computes_what_it_did(tmp_path):
    edited, _ = _as_before(tmp_path)
    assert adapters.JolaConfig.from_pretrained(tmp_path).gate_rate == 1.0
    assert adapters.JolaConfig().gate_rate == 10.0
    for light in (False, True):
        model = peft.PeftModel.from_pretrained(build("llama"), tmp_path, low_cpu_mem_usage=light).eval()
        assert torch.equal(output(model, VALUES), edited)
    plain = build("llama")
    plain.load_adapter(tmp_path)
    assert torch.equal(output(plain.eval(), VALUES), edited)
    model.save_pretrained(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "again").eval()
    assert torch.equal(output(again, VALUES), edited)


def test_an_old_file_over_an_adapter_in_other_units(tmp_path):
    edited, tensors = _as_before(tmp_path)
    for load in (
        lambda model: model.load_adapter(tmp_path, "default"),
        lambda model: peft.set_peft_model_state_dict(model, tensors),
    ):
        model = _model(init_std=1.0)
        adapters.measure_units(model, [VALUES])
        load(model)
        assert torch.equal(output(model.eval(), VALUES), edited)
        assert all(bool((layer.jola_unit_a["default"] == 1).all()) for layer in _layers(model))
        groups = {g["name"]: g["lr"] for g in adapters.parameter_groups(model.train(), lr=1e-3)}
        assert groups.get("jola_gates", 1e-2) == 1e-2


def test_a_file_with_some_of_its_units_is_refused(tmp_path):
    _model().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.load_file(file)
    tensors.pop(next(name for name in tensors if "layers.1" in name and "jola_unit_a" in name))
    safetensors.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"incomplete: missing .*layers\.1.*jola_unit_a"):
        peft.PeftModel.from_pretrained(build("llama"), tmp_path)
    model = _model()
    with pytest.raises(ValueError, match=r"incomplete: missing .*layers\.1.*jola_unit_a"):
        peft.set_peft_model_state_dict(model, tensors)


# --- what training does in them -----------------------------------------------------------------------------------


def test_gradients_in_units_agree_with_finite_differences():
    model = _model("gpt2").double()
    tokens = VALUES["input_ids"]
    adapters.measure_units(model, [tokens])

    def value():
        logits = model(tokens).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        return loss + adapters.jola_penalty(model)

    value().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                original, values = parameter.clone(), []
                for sign in (1, -1):
                    parameter.view(-1)[0] += sign * 1e-5
                    values.append(value())
                    parameter.copy_(original)
            numeric = (values[0] - values[1]) / 2e-5
            torch.testing.assert_close(
                parameter.grad.view(-1)[0], numeric, rtol=1e-4, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_one_step_of_adam_is_a_part_of_each_head_and_ten_times_as_far_for_gates():
    model = _model(init_std=0.0, freeze_gates=False)
    adapters.measure_units(model, [VALUES])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=0.0)  # one group, as most trainers make it
    before = [layer.log_alpha("a", "default").detach() for layer in _layers(model)]
    (model(**VALUES).logits.square().mean() + adapters.jola_penalty(model)).backward()
    optimizer.step()
    for layer, log_alpha in zip(_layers(model), before):
        moved = layer.vectors("a", "default").detach().abs() / layer.jola_unit_a["default"].unsqueeze(-1)
        torch.testing.assert_close(moved, torch.full_like(moved, 0.01), rtol=1e-5, atol=0)
        steps = (layer.log_alpha("a", "default").detach() - log_alpha).abs()
        torch.testing.assert_close(steps, torch.full_like(steps, 0.1), rtol=1e-5, atol=0)


def test_gates_close_in_a_trainer_that_makes_one_group():
    model = _model(log_alpha=2.5).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(150):
        adapters.add_penalty_grad(model, 0.1)
        optimizer.step()
        optimizer.zero_grad()
    assert not any(heads for parts in adapters.open_heads(model).values() for heads in parts.values())


def test_parameter_groups_know_the_units():
    def rates(model, **options):
        return {group["name"]: group["lr"] for group in adapters.parameter_groups(model.train(), **options)}

    model = _model(gate_rate=4.0)
    assert rates(model) == {"jola_edits": 5e-3, "jola_gates": 5e-3}  # log alpha: four times that
    assert rates(model, lr=1e-2, gate_lr=0.2) == {"jola_edits": 1e-2, "jola_gates": 0.2 / 4}
    adapters.measure_units(model, [VALUES])
    assert rates(model) == {"jola_edits": 5e-2, "jola_gates": 5e-2}
    assert rates(_model(gate_rate=1.0), lr=1e-2) == {"jola_edits": 1e-2, "jola_gates": 0.1}
    model.add_adapter("second", adapters.JolaConfig(gate_rate=8.0))
    model.base_model.set_adapter(["default", "second"])
    groups = adapters.parameter_groups(model, lr=1e-2, gate_lr=0.2)
    assert [(g["name"], g["lr"], len(g["params"])) for g in groups] == [
        ("jola_edits", 1e-2, 8),
        ("jola_gates", 0.2 / 4, 4),
        ("jola_gates", 0.2 / 8, 4),
    ]


class _Data(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        tokens = VALUES["input_ids"][index % 3]
        return {"input_ids": tokens, "labels": tokens}


def _trainer(folder, model, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    callback = adapters.JolaPenaltyCallback(**options)
    return transformers.Trainer(model, arguments, train_dataset=_Data(), callbacks=[callback])


def test_the_trainer_callback_measures_units_once(tmp_path):
    expected = adapters.measure_units(_model(), [VALUES["input_ids"]])
    model = _model()
    trainer = _trainer(tmp_path, model)
    trainer.train()
    for layer in _layers(model):
        assert layer.jola_unit_a["default"].tolist() == pytest.approx(expected[layer.site], rel=1e-5)
    for layer in _layers(model):
        layer.jola_unit_a["default"].fill_(3.0)
    trainer.train()
    assert all(bool((layer.jola_unit_a["default"] == 3).all()) for layer in _layers(model))
    model = _model()
    _trainer(tmp_path, model, units=0).train()
    assert all(bool((layer.jola_unit_a["default"] == 1).all()) for layer in _layers(model))


def test_a_training_set_that_the_model_does_not_take_is_named(tmp_path):
    class Other(_Data):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"labels": torch.tensor(7)}

    trainer = _trainer(tmp_path, _model())
    trainer.train_dataset = Other()
    with pytest.raises(ValueError, match=r"units .* cannot be measured on the training set: .*units=0"):
        trainer.train()
    with pytest.raises(ValueError, match="units must be a number of examples, 0 or more, got -1"):
        adapters.JolaPenaltyCallback(units=-1)


# --- what cannot be measured ----------------------------------------------------------------------------------------


def _unchanged(model, match, batches):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        adapters.measure_units(model, batches)
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name
    assert not any(layer._forward_pre_hooks or layer.disable_adapters for layer in _layers(model))


def test_no_data_and_wrong_data_are_refused():
    _unchanged(_model(), "at least one token that gets to an edited layer, got none", [])
    masked = {**VALUES, "attention_mask": torch.zeros_like(VALUES["input_ids"])}
    _unchanged(_model(), "at least one token that gets to an edited layer, got none", [masked])
    _unchanged(_model("gpt2"), "specify either input_ids or inputs_embeds", [VALUES, {"words": 3}])
    with pytest.raises(ValueError, match="expected a model with a JoLA adapter"):
        adapters.measure_units(build("llama"), [VALUES])
    with pytest.raises(ValueError, match=r"adapter must be one of \['default'\], got 'other'"):
        adapters.measure_units(_model(), [VALUES], "other")


def test_outputs_that_are_not_finite_are_refused():
    model = _model()
    with torch.no_grad():
        model.base_model.model.model.layers[1].self_attn.v_proj.weight[0, 0] = math.nan
    _unchanged(model, r"layers\.1\.self_attn\.o_proj: expected finite outputs of heads, got NaN or infinity", [VALUES])


def test_a_merged_adapter_is_refused():
    model = _model()
    model.merge_adapter()
    _unchanged(model, r"o_proj: measuring units needs unmerged adapters, got \['default'\] merged", [VALUES])
    assert model.base_model.model.model.layers[0].self_attn.o_proj.merged


def test_heads_that_put_out_nothing_get_the_smallest_unit():
    model = _model()
    values = [layer.self_attn.v_proj.weight for layer in model.base_model.model.model.layers]
    with torch.no_grad():
        values[0][:8] = 0  # the first of two key-value heads: heads 0 and 1
    adapters.measure_units(model, [VALUES])
    first, second = (layer.jola_unit_a["default"] for layer in _layers(model))
    median = torch.cat([first[2:], second]).double().median()
    torch.testing.assert_close(first[:2].double(), (median / 1000).expand(2), rtol=4 * EPS, atol=0)
    with torch.no_grad():
        for weight in values:
            weight.zero_()
    _unchanged(model, "heads put something out, got zeros from all", [VALUES])


def test_a_layer_that_is_not_reached_keeps_its_units():
    model = _model("t5")
    sites = [layer.site for layer in _layers(model)]
    encoder = model.get_encoder()
    with pytest.warns(UserWarning, match=r"no batch got to decoder\..* and \d+ others: their units stay as they are"):
        found = adapters.measure_units(_Encoder(model, encoder), [VALUES["input_ids"]])
    assert list(found) == [site for site in sites if site.startswith("encoder")]
    for layer in _layers(model):
        assert bool((layer.jola_unit_a["default"] == 1).all()) is (layer.site not in found)


class _Encoder(torch.nn.Module):
    """Calls only a part of a model."""

    def __init__(self, model, part):
        super().__init__()
        self.model, self.part = model, [part]

    def forward(self, tokens):
        return self.part[0](tokens)


def test_no_additive_edits_need_no_units():
    assert adapters.measure_units(_model(edit="multiplicative"), []) == {}


def test_gate_rate_is_checked():
    for value in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="gate_rate must be positive and finite, got"):
            adapters.JolaConfig(gate_rate=value)


# --- several processes ------------------------------------------------------------------------------------------------


def _measured(wrap, rank, folder, want):
    model = _model()
    wrapped = wrap(model)
    half = VALUES["input_ids"][: 1 if rank == 0 else 3][-1 if rank == 0 else -2 :]  # one row here, two there
    adapters.measure_units(wrapped, [{"input_ids": half}])
    for layer, expected in zip(_layers(model), want):
        torch.testing.assert_close(layer.jola_unit_a["default"], expected["unit"], rtol=1e-5, atol=0)
        value = layer.jola_a["default"]
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        torch.testing.assert_close(value, expected["a"], rtol=1e-5, atol=0)


def _fsdp2(model):
    from torch.distributed.fsdp import fully_shard

    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def _tensor_parallel(rank, folder, want):
    base = transformers.LlamaForCausalLM.from_pretrained(folder, tp_plan="auto")
    torch.manual_seed(4)
    model = peft.get_peft_model(base, adapters.JolaConfig(init_std=0.3, init_log_alpha=0.4)).eval()
    adapters.measure_units(model, [VALUES])
    for layer, expected in zip(_layers(model), want):
        torch.testing.assert_close(layer.jola_unit_a["default"], expected["unit"], rtol=1e-4, atol=0)


CASES = {
    "ddp": lambda *args: _measured(torch.nn.parallel.DistributedDataParallel, *args),
    "fsdp2": lambda *args: _measured(_fsdp2, *args),
    "tensor parallel": _tensor_parallel,
}


def _case(name, rank, folder, want):
    CASES[name](rank, folder, want)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("units")
    build("llama").save_pretrained(folder)
    model = _model()
    adapters.measure_units(model, [{"input_ids": VALUES["input_ids"]}])
    want = [
        {"unit": layer.jola_unit_a["default"].clone(), "a": layer.jola_a["default"].detach().clone()}
        for layer in _layers(model)
    ]
    return run_in_two(_case, CASES, folder, want)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_measure_what_one_does(results, case):
    assert [result[case] for result in results] == ["", ""]
