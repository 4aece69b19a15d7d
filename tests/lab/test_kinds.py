"""Texts and time series: they are read, batched, trained on and loaded again as images are."""

import json
import warnings

import pytest
import torch
from torch import nn

from ctkernels.cli import main
from ctkernels.lab import load_data, load_model
from ctkernels.lab._distributed import Group
from ctkernels.lab.data import labelled_texts
from ctkernels.lab.images.features import extract
from ctkernels.lab.jola import Example, TextData
from ctkernels.lab.labelled import Splits, batches
from ctkernels.lab.series import SeriesSet, read_series
from ctkernels.lab.texts import TextSet, load_encoder
from ctkernels.lab.transfer import ImageOptions, TrainingConfig, compare_transfer, load_tuned, tune, tune_curvature

for module in ("peft", "accelerate", "safetensors", "sklearn", "tqdm"):
    pytest.importorskip(module, reason="the comparison needs ctkernels[lab]")

LENGTH = 12
QUICK = {"training": TrainingConfig(2, 8), "cpu": True, "progress": False}


# --- series -----------------------------------------------------------------------------------------------------------


def wave_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 4)
    )  # fmt: skip


def waves(n, seed):
    """Two channels whose frequency depends on the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    time = torch.linspace(0, 6, LENGTH)
    clean = torch.sin(time * (1 + 2 * labels[:, None, None]) + torch.rand(n, 2, 1, generator=generator))
    return 5 + clean + 0.3 * torch.randn(n, 2, LENGTH, generator=generator), labels


def wave_splits(n=40, test=30):
    train, tested = (SeriesSet(*waves(count, seed), ("slow", "fast")) for seed, count in enumerate((n, test)))
    return Splits(train, None, tested, "waves")


def write_ts(path, series, names, header="@problemName waves\n@timeStamps false\n@classLabel true slow fast\n@data\n"):
    rows = [":".join(",".join(f"{v:.6f}" for v in channel) for channel in one) for one in series.tolist()]
    path.write_text("# about\n" + header + "".join(f"{row}:{name}\n" for row, name in zip(rows, names)))


def test_series_files(tmp_path):
    series, labels = waves(6, 0)
    names = [("slow", "fast")[i] for i in labels]
    write_ts(tmp_path / "waves_TRAIN.ts", series, names)
    write_ts(tmp_path / "waves_TEST.ts", series[:4], names[:4])
    for spec in (tmp_path, tmp_path / "waves_TRAIN.ts"):
        splits = load_data(spec)
        assert splits.train.classes == ("fast", "slow")
        assert [splits.train.classes[i] for i in splits.train.labels] == names
        torch.testing.assert_close(splits.train.series, series, atol=5e-7, rtol=0)  # six digits are written
        assert (len(splits.test), splits.val) == (4, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("@classLabel true a b\n@data\n1,2:a\n1,?:b\n", "TRAIN.ts:4: expected numbers .*no values missing"),
        ("@classLabel true a b\n@data\n1,2:a\n1,2,3:b\n", "TRAIN.ts:4: expected all series to have the channels and"),
        ("@classLabel true a b\n@data\n1,2:a\n1,2:1,2:b\n", "TRAIN.ts:4: expected all series to have the channels and"),
        ("@classLabel true a b\n@data\n1,2:a\na\n", "TRAIN.ts:4: expected all series"),
        ("@classLabel true a b\n@data\n1,nan:a\n1,2:b\n", "series must be finite, 1 of 2"),
        ("@classLabel true a b\n@data\n1,2:a\n1,2:a\n", "expected at least two classes"),
        ("@classLabel false\n@data\n1,2\n", "expected all series|classLabel true"),
        ("@timeStamps true\n@classLabel true a b\n@data\n1,2:a\n", "no time stamps"),
        ("@classLabel true a b\n@data\n", "expected series after @data, found none"),
        ("1,2:a\n", "TRAIN.ts:1: expected a header line"),
    ],
)
def test_series_files_that_are_refused(text, message, tmp_path):
    (tmp_path / "x_TRAIN.ts").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_series(tmp_path / "x_TRAIN.ts")


def test_series_are_standardised_by_channel():
    data = wave_splits().train
    ready = data.prepared(data.preparation(ImageOptions(), wave_net()))
    values = torch.stack([ready[i][0] for i in range(len(ready))])
    torch.testing.assert_close(values.mean((0, 2)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.std((0, 2), correction=0), torch.ones(2), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="normalise must be target for series, got imagenet"):
        data.preparation(ImageOptions(normalise="imagenet"), wave_net())
    with pytest.raises(ValueError, match="series must vary in every channel"):
        SeriesSet(torch.ones(4, 1, 3), torch.tensor([0, 1, 0, 1]), ("a", "b")).preparation(ImageOptions(), wave_net())


# --- texts ------------------------------------------------------------------------------------------------------------

WORDS = ["<pad>", "<unk>", "a", "red", "green", "blue", "round", "long", "thing", "fruit", "tool"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A folder with a tiny BERT and its tokenizer."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("encoder")
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, initializer_range=0.5,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return f"encoder:{folder}"


def sentences(n=60):
    def example(i):
        noun = ("fruit", "tool")[i % 2]
        shape = ("round", "long")[i % 2] if i % 5 else "red"
        return Example(" ".join(["a", *["green"] * (i % 4), shape, noun]), noun)

    return TextData(tuple(map(example, range(n))), source="made up")


def test_an_encoder_averages_over_the_tokens_of_each_text(encoder):
    network = load_model(encoder)
    tokens = torch.tensor([[2, 3, 8, 0, 0], [2, 3, 4, 5, 8]])
    with torch.no_grad():
        both = network(tokens)
        alone = torch.cat([network(tokens[:1, :3]), network(tokens[1:])])
        states = network.model(input_ids=tokens[1:]).last_hidden_state
    torch.testing.assert_close(both, alone, atol=1e-5, rtol=1e-5)  # sums in another order, of numbers of about one
    torch.testing.assert_close(both[1:], states.mean(1), atol=1e-5, rtol=1e-5)
    assert network.model.pooler is None
    torch.manual_seed(1)  # not the seed of the saved weights
    assert not torch.equal(load_model(encoder, weights="none")(tokens), both)
    with pytest.raises(ValueError, match="is no encoder that could be loaded"):
        load_model("encoder:nothing/here/at/all")


def test_texts_are_batched_with_padding_and_features_do_not_depend_on_the_batch(encoder):
    network = load_model(encoder)
    data = labelled_texts(sentences()).train
    data = data.prepared(data.preparation(ImageOptions(max_tokens=5), network))
    tokens, labels = next(iter(batches(data, 4)))
    assert tokens.shape == (4, 5)
    assert tokens[0].tolist() == [2, 3, 9, 0, 0]
    assert labels.tolist() == data.labels[:4].tolist()
    seen = {}
    for size in (1, 7):
        options = {"batch_size": size, "workers": 0, "device": torch.device("cpu"), "group": Group()}
        seen[size] = extract([data], [network], 16, **options, advance=lambda step: None)
    torch.testing.assert_close(seen[1], seen[7], atol=1e-5, rtol=1e-5)


def test_text_files(tmp_path):
    rows = [{"prompt": e.prompt, "answer": e.answer} for e in sentences(6).train]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for spec in (tmp_path, tmp_path / "train.jsonl"):
        data = load_data(spec)
        assert isinstance(data.train, TextSet)
        assert data.train.classes == ("fruit", "tool")
        assert [data.train.classes[i] for i in data.train.labels] == [row["answer"] for row in rows]
    more = TextData(sentences(6).train, None, (Example("a red thing", "thing"),), "more")
    with pytest.raises(ValueError, match=r"more: test has answers that train does not have: \['thing'\]"):
        labelled_texts(more)


# --- both -------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["series", "texts"])
def case(request):
    """A network, data for it, and the activations it has."""
    if request.param == "series":
        return wave_net, wave_splits(), {"betas": [0.8]}
    path = request.getfixturevalue("encoder")
    options = {"betas": [0.6], "activations": ["gelu"], "images": ImageOptions(max_tokens=6)}
    return lambda: load_encoder(path.partition(":")[2]), labelled_texts(sentences()), options


@pytest.mark.parametrize("kept", ["linear", "sct", "tct"])
def test_tune_saves_what_it_tested(case, kept, tmp_path, monkeypatch):
    make, data, options = case
    monkeypatch.setattr(tune, "kept_stage", lambda result: kept)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that T-CT is below the probe, where it is
        result = tune_curvature(make, data, tmp_path, head_lr=[0.05], seed=0, folds=2, **options, **QUICK)
    run = result.tested("model", "data", kept)[0]
    network, preprocess, classes = load_tuned(make(), tmp_path)
    assert classes == data.train.classes
    test = data.complete(val=0.2, test=0.2, seed=0, test_seed=0)[2]
    with torch.no_grad():
        answers = [int(network(preprocess(test.raw(i))[None]).argmax()) for i in range(len(test))]
    assert "".join(str(int(a == y)) for a, y in zip(answers, test.labels.tolist())) == run.right
    assert (tmp_path / "adapter").exists() == (kept == "tct")


def test_every_method_takes_them(case):
    make, data, options = case
    methods = ["linear", "sct", "lora-r1", "tct", "tct+lora-r1"]
    options |= {"methods": methods, "seeds": (0,), "folds": 1, **QUICK}
    result = compare_transfer({"net": make}, {"data": data}, **options)
    assert {run.method for run in result.runs} == set(methods)
    assert all(run.parameters > 0 for run in result.runs if run.method not in ("linear", "sct"))
    again = compare_transfer({"net": make}, {"data": data}, memory_limit=1, **options)  # made ready when read, not kept
    assert [run.right for run in again.runs] == [run.right for run in result.runs]


def test_networks_and_data_that_do_not_fit_are_told_before_any_work(encoder):
    texts = labelled_texts(sentences())
    with pytest.raises(
        ValueError, match=r"model net: texts need a network with a tokenizer, such as encoder:NAME, got Seq"
    ):
        compare_transfer({"net": wave_net}, {"data": texts}, methods=["linear"], **QUICK)
    with pytest.raises(ValueError, match=r"model net: series of shape \(1, 2, 12\) do not fit TextEncoder"):
        compare_transfer({"net": load_model(encoder)}, {"data": wave_splits()}, methods=["linear"], **QUICK)
    nan = wave_splits()
    nan.train.series[3, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="data data: series must be finite, 1 of 40"):
        compare_transfer({"net": wave_net}, {"data": nan}, methods=["linear"], **QUICK)


def test_from_the_command_line(encoder, tmp_path, capsys):
    rows = [f"{e.prompt},{e.answer}" for e in sentences(40).train]
    (tmp_path / "texts.csv").write_text("\n".join(["prompt,answer", *rows]))
    arguments = [str(tmp_path / "texts.csv"), "--model", encoder, "--activations", "gelu", "--betas", "0.6"]
    arguments += [
        "--epochs",
        "1",
        "--device",
        "cpu",
        "--no-progress",
        "--max-tokens",
        "6",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(["tune", *arguments]) == 0
    told = capsys.readouterr().out
    assert told.startswith("texts.csv: 30 validation examples in 5 folds: the simpler method is kept unless")
    assert "validation prefers" in told
    write_ts(tmp_path / "waves_TRAIN.ts", waves(40, 0)[0], ["slow", "fast"] * 20)
    arguments = [
        str(tmp_path / "waves_TRAIN.ts"),
        "--model",
        "test_kinds:wave_net",
        "--methods",
        "linear",
        "--seeds",
        "0",
    ]
    assert (
        main(["compare", *arguments, "--epochs", "1", "--device", "cpu", "--no-progress", "--out", str(tmp_path / "c")])
        == 0
    )
    assert main(["steer", str(tmp_path / "waves_TRAIN.ts"), "--model", "test_kinds:wave_net"]) == 2
    assert "data must be a folder of images" in capsys.readouterr().err
