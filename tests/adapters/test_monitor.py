"""The monitor of edit sizes: exact statistics, flags, padding, no hooks when off, and the report by texts."""

from __future__ import annotations

import pytest
import torch
from jola_families import build, inputs
from torch.utils._python_dispatch import TorchDispatchMode

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
adapters = pytest.importorskip("ctkernels.adapters")

from ctkernels.adapters import edit_sizes, gate_map  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
TOKENS = inputs("llama", batch=3)["input_ids"]
SITE = "model.layers.0.self_attn.o_proj"


def _model(**values):
    torch.manual_seed(1)
    return peft.get_peft_model(build("llama"), adapters.JolaConfig(**{"init_std": 0.3, **values})).eval()


def _seen_by(model, tokens):
    """Input and edited input of every JoLA layer, recorded from outside."""
    found = {}
    layers = [m for m in model.modules() if isinstance(m, adapters.JolaLayer)]
    handles = [m.register_forward_pre_hook(lambda m, x: found.update({m.site: [x[0]]})) for m in layers]
    handles += [m.base_layer.register_forward_pre_hook(lambda _, x, m=m: found[m.site].append(x[0])) for m in layers]
    with torch.no_grad():
        model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return {
        site: (after - before).unflatten(-1, (4, 8)).norm(dim=-1) / before.unflatten(-1, (4, 8)).norm(dim=-1)
        for site, (before, after) in found.items()
    }


def test_statistics_are_those_of_the_edits():
    model = _model()
    parts = [_seen_by(model, tokens) for tokens in (TOKENS[:1], TOKENS[1:])]
    monitor = adapters.EditMonitor(model)
    with monitor, torch.no_grad():
        model(input_ids=TOKENS[:1])
        model(input_ids=TOKENS[1:])
    for site, found in monitor.statistics().items():
        sizes = torch.cat([part[site].flatten(0, 1) for part in parts])
        torch.testing.assert_close(torch.tensor(found["mean"], dtype=torch.float32), sizes.mean(0), rtol=1e-4, atol=0)
        torch.testing.assert_close(torch.tensor(found["min"]), sizes.amin(0), rtol=1e-4, atol=0)
        torch.testing.assert_close(torch.tensor(found["max"]), sizes.amax(0), rtol=1e-4, atol=0)
        assert found["tokens"] == [TOKENS.numel()]


def test_off_leaves_no_hook_and_on_changes_no_output():
    model = _model()
    hooks = [list(module._forward_pre_hooks) for module in model.modules()]
    monitor = adapters.EditMonitor(model)
    with torch.no_grad():
        plain = model(input_ids=TOKENS).logits
        with monitor:
            assert torch.equal(model(input_ids=TOKENS).logits, plain)
            assert monitor.on
    assert not monitor.on
    assert [list(module._forward_pre_hooks) for module in model.modules()] == hooks


class _Operations(TorchDispatchMode):
    """The names of the operations that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket._qualified_op_name)
        return function(*args, **(kwargs or {}))


def test_nothing_is_read_back_from_the_device():
    model = _model()
    monitor = adapters.EditMonitor(model)
    with monitor.calibrating(), torch.no_grad():
        model(input_ids=TOKENS)
    counts = []
    with torch.no_grad():
        for on in (False, True):
            if on:
                monitor.attach()
            with _Operations() as seen:
                model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS))
            counts.append([seen.names.count(f"aten::{name}") for name in ("_local_scalar_dense", "nonzero", "equal")])
    assert counts[0] == counts[1]


def test_padding_does_not_count():
    model = _model()
    found = []
    for padded in (False, True):
        monitor = adapters.EditMonitor(model)
        row = TOKENS[:1]
        mask = torch.ones_like(row)
        if padded:
            row = torch.cat([row, torch.full((1, 3), 7)], 1)
            mask = torch.cat([mask, torch.zeros(1, 3, dtype=mask.dtype)], 1)
        with monitor, torch.no_grad():
            model(input_ids=row, attention_mask=mask)
        found.append(monitor.statistics()[SITE])
    assert found[0]["tokens"] == found[1]["tokens"]
    assert found[1]["max"] == pytest.approx(found[0]["max"], rel=1e-5)


def test_inputs_outside_the_calibrated_range_are_flagged():
    model = _model()
    monitor = adapters.EditMonitor(model, margin=0.01)
    with monitor.calibrating(), torch.no_grad():
        model(input_ids=TOKENS)
    assert monitor.flags is None
    embeddings = model.get_input_embeddings()
    with monitor, torch.no_grad():
        model(input_ids=TOKENS)
        assert monitor.flags.tolist() == [False, False, False]
        usual = embeddings(TOKENS[:2])
        strange = torch.stack([usual[0], usual[1] * torch.linspace(-3, 3, usual.shape[-1])])
        model(inputs_embeds=strange)  # another number of rows: new inputs
        assert monitor.flags.tolist() == [False, True]
        assert (monitor.rows, monitor.flagged) == (3, 0)
        monitor.begin()
    assert (monitor.rows, monitor.flagged) == (5, 1)


def test_generation_accumulates_flags_over_its_steps():
    model = _model()
    monitor = adapters.EditMonitor(model)
    with monitor, torch.no_grad():
        model.generate(input_ids=TOKENS[:2], max_new_tokens=3, do_sample=False, min_new_tokens=3)
    assert monitor.flags.tolist() == [False, False]
    assert monitor.statistics()[SITE]["tokens"] == [2.0 * (TOKENS.shape[1] + 2)]


def test_the_range_is_saved_and_checked(tmp_path):
    model = _model()
    monitor = adapters.EditMonitor(model, margin=0.2)
    with monitor.calibrating(), torch.no_grad():
        model(input_ids=TOKENS)
    monitor.save(tmp_path / "range.json")
    other = adapters.EditMonitor(model)
    other.load(tmp_path / "range.json")
    assert other.margin == 0.2
    with other, torch.no_grad():
        model(input_ids=TOKENS)
    assert not other.flags.any()
    (tmp_path / "bad.json").write_text('{"format": "else"}')
    with pytest.raises(ValueError, match=r"expected a range that EditMonitor\.save wrote"):
        other.load(tmp_path / "bad.json")
    part = adapters.EditMonitor(_model(layers_to_transform=[1]))
    with pytest.raises(ValueError, match="expected the sites"):
        part.load(tmp_path / "range.json")


def test_it_reads_a_merged_adapter_too():
    model = _model()
    monitor = adapters.EditMonitor(model)
    with monitor, torch.no_grad():
        model(input_ids=TOKENS)
    before = monitor.statistics()[SITE]["mean"]
    model.merge_adapter()
    monitor.reset()
    with monitor, torch.no_grad():
        model(input_ids=TOKENS)
    assert monitor.statistics()[SITE]["mean"] == pytest.approx(before, rel=1e-4)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="expected a model with a JoLA adapter"):
        adapters.EditMonitor(build("llama"))
    with pytest.raises(ValueError, match="margin must not be negative, got -1"):
        adapters.EditMonitor(_model(), margin=-1)


class _Letters:
    """One token per letter."""

    pad_token_id = 0

    def __call__(self, text, **_):
        return {"input_ids": [3 + ord(letter) % 40 for letter in text]}


def test_the_report_finds_the_text_a_planted_edit_acts_on():
    model = _model(init_std=0.0)
    texts = ["aaaa", "bcdbcd", "hello there", "zz"]
    layer = next(m for m in model.modules() if isinstance(m, adapters.JolaLayer))
    ids = torch.tensor([_Letters()(texts[2])["input_ids"]])
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        model(input_ids=ids)
        handle.remove()
        # the edit scales one direction of head 2, the one in which this text's own output points
        layer.jola_m["default"][2] = seen[0].unflatten(-1, (4, 8))[0, :, 2].abs().mean(0) * 50
    before = {name: module.training for name, module in model.named_modules()}
    report = edit_sizes(model, _Letters(), texts, batch_size=3)
    assert before == {name: module.training for name, module in model.named_modules()}
    assert report.heads() == [(SITE, 2)]
    assert report.mean()[0, [0, 1, 3]].tolist() == [0, 0, 0]
    z = seen[0].unflatten(-1, (4, 8))[0, :, 2]
    expected = ((z * layer.jola_m["default"][2]).norm(dim=-1) / z.norm(dim=-1)).mean()
    torch.testing.assert_close(report.sizes[2, 0, 2], expected.detach(), rtol=1e-4, atol=0)
    alone = [edit_sizes(model, _Letters(), [text]).sizes[0, 0, 2].item() for text in texts]
    assert report.sizes[:, 0, 2].tolist() == pytest.approx(alone, rel=1e-4)  # padding changes nothing
    largest = report.largest(SITE, 2, 4)
    assert [size for _, size in largest] == sorted(alone, reverse=True) or [s for _, s in largest] == pytest.approx(
        sorted(alone, reverse=True)
    )
    assert largest[0][0] == texts[alone.index(max(alone))]
    assert f"{SITE} head 2" in report.text()
    with pytest.raises(ValueError, match="site and head must be among"):
        report.largest("nowhere", 0)
    with pytest.raises(ValueError, match="texts must be one or more texts in a list, got a string"):
        edit_sizes(model, _Letters(), "hello")


def test_the_gate_map_knows_open_closed_and_absent(tmp_path):
    model = _model(heads={0: [0, 1], 1: {"a": [3]}})
    layer = next(m for m in model.modules() if isinstance(m, adapters.JolaLayer))
    with torch.no_grad():
        layer.jola_log_alpha_m["default"][:] = -5.0
        layer.jola_log_alpha_a["default"][0] = -5.0
    found = gate_map(model)
    assert found.kept() == [(SITE, 1), (SITE.replace("0", "1"), 3)]
    assert found.sparsity == pytest.approx(3 / 5)
    assert found.m[0][:2] == (0, 0)
    assert found.a[0][1] == 1
    assert str(found.m[1]) == "(nan, nan, nan, nan)"
    assert found.parameters == 5 * 9
    assert "2 of 8 heads edited, 60.0 % of the gates closed, 45 parameters" in found.text()
    again = type(found).from_dict(found.to_dict())
    assert str(again) == str(found)
    pytest.importorskip("matplotlib")
    from ctkernels.adapters import plot_gates

    plot_gates([found, again], tmp_path / "gates.png", ["start", "end"])
    assert (tmp_path / "gates.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="labels must be one per frame, 1, got 2"):
        plot_gates(found, tmp_path / "gates.png", ["start", "end"])
