"""The monitor of edit sizes: exact statistics, flags, padding, no hooks when off, and the report by texts."""

from __future__ import annotations

import json
import statistics
import threading

import pytest
import torch
from jola_families import build, inputs
from torch.utils._python_dispatch import TorchDispatchMode

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
adapters = pytest.importorskip("ctkernels.adapters")

from ctkernels.adapters import edit_sizes, gate_map  # noqa: E402
from ctkernels.adapters.monitor.reference import Drift, Reference  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
TOKENS = inputs("llama", batch=3)["input_ids"]
SITE = "model.layers.0.self_attn.o_proj"


def _model(**values):
    torch.manual_seed(1)
    return peft.get_peft_model(build("llama"), adapters.JolaConfig(**{"init_std": 0.3, **values})).eval()


def _watching(model, *args, **values):
    """A monitor that watches every batch unless told otherwise."""
    return adapters.EditMonitor(model, *args, **{"every": 1, **values})


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
    monitor = _watching(model)
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
    monitor = _watching(model)
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
    monitor = _watching(model, window=1)
    with monitor.calibrating(), torch.no_grad():
        model(input_ids=TOKENS)
    counts = []
    with torch.no_grad():
        for on in (False, True):
            if on:
                monitor.attach()
            with _Operations() as seen:
                for _ in range(2):  # the second begins new inputs, so that the first are counted
                    model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS))
            counts.append([seen.names.count(f"aten::{name}") for name in ("_local_scalar_dense", "nonzero", "equal")])
    assert counts[0] == counts[1]
    assert (monitor.rows, monitor.snapshot().windows) == (3, 3)


def test_padding_does_not_count():
    model = _model()
    found = []
    for padded in (False, True):
        monitor = _watching(model)
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
    monitor = _watching(model, margin=0.01, window=None)
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
    monitor = _watching(model)
    with monitor, torch.no_grad():
        model.generate(input_ids=TOKENS[:2], max_new_tokens=3, do_sample=False, min_new_tokens=3)
    assert monitor.flags.tolist() == [False, False]
    assert monitor.statistics()[SITE]["tokens"] == [2.0 * (TOKENS.shape[1] + 2)]


def test_the_range_is_saved_and_checked(tmp_path):
    model = _model()
    monitor = _watching(model, margin=0.2, window=1)
    with monitor.calibrating(), torch.no_grad():
        model(input_ids=TOKENS)
    monitor.save(tmp_path / "range.json")
    other = _watching(model)
    other.load(tmp_path / "range.json")
    assert other.margin == 0.2
    assert other.reference.drift.threshold == monitor.reference.drift.threshold
    with other, torch.no_grad():
        model(input_ids=TOKENS)
    assert not other.flags.any()
    (tmp_path / "bad.json").write_text('{"format": "else"}')
    with pytest.raises(ValueError, match=r"expected what EditMonitor\.save wrote for this model"):
        other.load(tmp_path / "bad.json")
    part = _watching(_model(layers_to_transform=[1]))
    with pytest.raises(ValueError, match="expected the sites"):
        part.load(tmp_path / "range.json")


def test_a_range_of_the_first_format_is_read(tmp_path):
    sites = {SITE.replace("0", str(i)): {"low": [0.0] * 4, "high": [9.0] * 4} for i in range(2)}
    (tmp_path / "edit_monitor.json").write_text(
        json.dumps({"format": "ctkernels.edit_monitor/1", "margin": 0.5, "sites": sites})
    )
    monitor = _watching(_model())
    monitor.load(tmp_path)  # the file in a folder
    with monitor, torch.no_grad():
        monitor.model(input_ids=TOKENS)
    assert monitor.flags.tolist() == [False, False, False]
    assert (monitor.reference.drift, monitor.reference.outside) == (None, None)


def test_few_inputs_give_a_range_and_a_warning():
    monitor = _watching(_model(), window=2)
    with pytest.warns(UserWarning, match="calibration saw 3 inputs, and drift over windows of 2 needs 4"):
        monitor.calibrate([{"input_ids": TOKENS}])
    assert monitor.reference.drift is None
    monitor.calibrate([{"input_ids": TOKENS[:1]}])  # adds to those before
    assert monitor.reference.drift.window == 2


def test_calibration_reaches_every_projection_in_evaluation_mode():
    model = _model()
    model.train()
    monitor = _watching(model, window=None)
    layer = model.get_base_model().model.layers[0]
    monitor.calibrate([{"input_ids": TOKENS}])
    assert model.training
    assert layer.training
    again = _watching(model.eval(), window=None)
    again.calibrate([{"input_ids": TOKENS}])
    assert torch.equal(monitor.reference.high, again.reference.high)
    with pytest.raises(ValueError, match=r"reach every edited projection with every input, got no token to \['model"):
        again.calibrate([{"input_ids": TOKENS, "attention_mask": torch.zeros_like(TOKENS)}])
    again.calibrate([{"input_ids": TOKENS}])  # what failed left nothing behind
    assert again.reference.inputs == 6


@pytest.mark.parametrize(
    "call", [lambda m: m, lambda m: m.base_model, lambda m: m.get_base_model(), lambda m: m.model.model]
)
def test_passes_are_seen_whichever_module_is_called(call):
    model = _model()
    with _watching(model) as monitor, torch.no_grad():
        call(model)(input_ids=TOKENS)
    assert monitor.statistics()[SITE]["tokens"] == [TOKENS.numel()]


def test_each_pass_without_a_cache_begins_new_inputs():
    model = _model()
    with _watching(model) as monitor, torch.no_grad():
        for _ in range(3):
            model(input_ids=TOKENS)
        assert monitor.rows == 6
        mask = torch.ones_like(TOKENS)
        model.generate(input_ids=TOKENS, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert monitor.rows == 9
        assert monitor._current.count[0, 0] == TOKENS.shape[1] + 2
        model(input_ids=TOKENS, attention_mask=mask)
        assert monitor.rows == 12


def test_padding_does_not_count_while_generating():
    model = _model()
    row, mask = torch.cat([torch.full((1, 3), 7), TOKENS[:1]], 1), torch.ones(1, TOKENS.shape[1] + 3, dtype=torch.long)
    mask[:, :3] = 0
    with _watching(model) as monitor, torch.no_grad():
        model.generate(input_ids=row, attention_mask=mask, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert monitor.statistics()[SITE]["tokens"] == [TOKENS.shape[1] + 1]


def test_one_of_so_many_batches_is_watched_to_its_end():
    model = _model()
    layer = next(m for m in model.modules() if isinstance(m, adapters.JolaLayer))
    with _watching(model, every=3) as monitor, torch.no_grad():
        for number in range(7):
            rows = TOKENS[: 1 + number % 2]
            model.generate(input_ids=rows, max_new_tokens=3, min_new_tokens=3, do_sample=False)
            assert not layer._forward_pre_hooks  # attention may edit inside again
            assert (monitor.flags is None) == (number % 3 > 0)
        monitor.begin()
    assert monitor.rows == 1 + 2 + 1  # numbers 0, 3 and 6
    assert monitor.snapshot().count[0] == 4 * (TOKENS.shape[1] + 2)


def test_an_error_in_the_model_ends_the_pass():
    model = _model()
    layer = next(m for m in model.modules() if isinstance(m, adapters.JolaLayer))
    with _watching(model) as monitor, torch.no_grad():
        with pytest.raises(IndexError):
            model(input_ids=TOKENS + 10_000)
        assert not layer._forward_pre_hooks
        model(input_ids=TOKENS)
    assert monitor.flags.tolist() == [False] * 3


def test_inference_mode_and_grad_mode_mix():
    model = _model()
    with _watching(model, window=1) as monitor:
        with torch.inference_mode():
            monitor.calibrate([{"input_ids": TOKENS}])
            model(input_ids=TOKENS)
        model(input_ids=TOKENS).logits.sum().backward()
        with torch.inference_mode():
            model(input_ids=TOKENS)
        monitor.begin()
    assert monitor.snapshot().inputs == 9
    assert monitor.snapshot().windows == 9


def test_a_scale_that_is_the_same_everywhere_is_never_unusual():
    """Its relative size is one number, and what rounding makes of it is no drift."""
    model = _model(init_std=0.0)
    for layer in (m for m in model.modules() if isinstance(m, adapters.JolaLayer)):
        torch.nn.init.constant_(layer.jola_m["default"], 0.37)
    monitor = _watching(model, window=2, margin=0)
    embed = model.get_input_embeddings()
    monitor.calibrate([{"inputs_embeds": embed((TOKENS + i) % 60).detach()} for i in range(4)])
    with monitor, torch.no_grad():
        for i in range(20):
            model(inputs_embeds=embed(TOKENS.roll(i, 1)) * (1 + i))
        monitor.begin()
    seen = monitor.snapshot()
    assert (seen.outside, seen.alarms, seen.windows) == (0, 0, 30)
    assert any(low < high for site in monitor.statistics().values() for low, high in zip(site["min"], site["max"]))


def test_a_compiled_model_is_seen_or_says_so():
    model = _model()
    with _watching(model) as monitor, torch.no_grad():
        torch.compile(model, backend="eager")(input_ids=TOKENS)
        assert monitor.statistics()[SITE]["tokens"] == [TOKENS.numel()]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(input_ids=TOKENS)
        with _watching(compiled), pytest.warns(UserWarning, match="saw a forward pass and no edited head"):
            compiled(input_ids=TOKENS)


def test_two_threads_do_not_mix():
    model = _model()
    with _watching(model) as monitor:

        def serve():
            with torch.no_grad():
                for _ in range(20):
                    model(input_ids=TOKENS)

        threads = [threading.Thread(target=serve) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        monitor.begin()
    seen = monitor.snapshot()
    assert seen.inputs % 3 == 0
    assert 3 <= seen.inputs <= 120
    assert set(seen.count) == {float(seen.inputs * TOKENS.shape[1])}


def test_it_reads_a_merged_adapter_too():
    model = _model()
    monitor = _watching(model)
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
        _watching(build("llama"))
    with pytest.raises(ValueError, match="margin must not be negative, got -1"):
        _watching(_model(), margin=-1)
    with pytest.raises(ValueError, match="every and window must be 1 or more and history 0 or more, got 0, 64 and 0"):
        _watching(_model(), every=0)
    with pytest.raises(ValueError, match=r"false_alarms must be between 0 and 1, got 1\.0"):
        _watching(_model(), false_alarms=1.0)
    with pytest.raises(ValueError, match="nothing to save before calibration"):
        _watching(_model()).save("nowhere.json")
    with pytest.raises(ValueError, match="calibration must see one or more inputs, got none"):
        _watching(_model()).calibrate([])


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


# --- the reference ----------------------------------------------------------------------------------------------------


def _inputs(count, heads, generator, shift=0.0):
    """Mean edits of inputs: positive, skewed, and dependent between heads."""
    common = torch.randn(count, 1, generator=generator)
    return (0.3 * (common + torch.randn(count, heads, generator=generator)) + shift).exp()


def test_windows_are_above_the_threshold_as_often_as_it_says():
    generator, rate, window = torch.Generator().manual_seed(1), 0.05, 20
    rates = []
    for _ in range(60):
        drift = Drift.of(_inputs(100, 12, generator), window, rate, 1e-6)
        windows = [_inputs(window, 12, generator) for _ in range(100)]
        alarms = [float(drift.distances(drift.below(w)).amax()) > drift.threshold for w in windows]
        rates.append(sum(alarms) / len(alarms))
    error = statistics.stdev(rates) / len(rates) ** 0.5  # over calibrations, each of which has a rate of its own
    assert rate / 2 < statistics.mean(rates) < rate + 3 * error


def test_drift_is_the_distance_between_distributions():
    generator = torch.Generator().manual_seed(2)
    drift = Drift.of(_inputs(400, 5, generator), 50, 0.01, 1e-6)
    shifted = _inputs(50, 5, generator)
    shifted[:, 3] = _inputs(50, 5, generator, 0.6)[:, 3]  # one head, by a bit more than its standard deviation
    distances = drift.distances(drift.below(shifted))
    assert distances.argmax() == 3
    assert distances[3] > drift.threshold
    edges = drift.edges[:, 3]
    by_hand = max(
        abs(float((shifted[:, 3] <= e).double().mean()) - s) for e, s in zip(edges, drift.shares[:, 3].tolist())
    )
    assert float(distances[3]) == pytest.approx(by_hand)


def test_inputs_outside_the_range_are_as_many_as_calibration_expects():
    generator, expected, seen = torch.Generator().manual_seed(3), [], []
    for _ in range(30):
        means = _inputs(80, 6, generator)
        reference = Reference.of(means, means * 0.9, means * 1.1, 0.05, None, 0.01, 1e-6)
        new = _inputs(400, 6, generator)
        expected.append(reference.outside)
        seen.append(float(reference.beyond(new * 0.9, new * 1.1, 1e-6).any(-1).double().mean()))
    assert sum(seen) / 30 == pytest.approx(sum(expected) / 30, rel=0.3)


def test_the_window_fills_over_batches():
    model = _model()
    monitor = _watching(model, window=4)
    monitor.calibrate([{"input_ids": (TOKENS + i) % 60} for i in range(4)])
    means = []
    with monitor, torch.no_grad():
        for i in range(4):  # 12 rows
            model(input_ids=(TOKENS + i) % 60)
            means.append(monitor._current.mean)
        monitor.begin()
    seen, drift = monitor.snapshot(), monitor.reference.drift
    assert (seen.windows, monitor._statistics.window._filled) == (3, 0)
    windows = torch.cat(means).split(4)
    distances = [drift.distances(drift.below(window)) for window in windows]
    assert seen.drift == distances[-1].tolist()
    assert seen.alarms == sum(float(d.amax()) > drift.threshold for d in distances)
    assert monitor.drift == float(distances[-1].amax())
