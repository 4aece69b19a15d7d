"""Prompts and answers from files, how they are drawn, and how bad rows are refused."""

import csv
import json

import pytest

from ctkernels.lab.jola import Example, TextData, draw, read_texts

CHOICES = ("fruit", "colour")
DATA = TextData(tuple(Example(f"{i} is a", CHOICES[i % 2], CHOICES) for i in range(80)))


def test_every_format_gives_the_same_examples(tmp_path):
    rows = [
        {"prompt": 'é "a", b', "answer": "x", "choices": ["x", "y"]},
        {"prompt": "c\nd", "answer": "y", "choices": ["x", "y"]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.csv").write_text('prompt,answer,choices\n"é ""a"", b",x,x|y\n"c\nd",y,"[""x"", ""y""]"\n', "utf-8")
    expected = tuple(Example(r["prompt"], r["answer"], tuple(r["choices"])) for r in rows)
    assert read_texts(tmp_path / "a.jsonl").train == expected
    assert read_texts(tmp_path / "a.csv").train == expected
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_texts(tmp_path / "a.parquet").train == expected
    (tmp_path / "split").mkdir()
    for name in ("train", "valid", "test"):
        (tmp_path / "split" / f"{name}.jsonl").write_text(json.dumps(rows[0]) + "\n")
    data = read_texts(tmp_path / "split")
    assert data.train == data.val == data.test == expected[:1]


def test_completion_is_read_as_the_answer(tmp_path):
    """TRL's names; its completions often begin with the space that stands between them and the prompt."""
    rows = [{"prompt": "The sky is", "completion": " blue."}, {"prompt": "The sun is", "completion": " yellow."}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.csv").write_text("prompt,completion\nThe sky is, blue.\nThe sun is, yellow.\n")
    expected = tuple(Example(row["prompt"], row["completion"]) for row in rows)
    assert read_texts(tmp_path / "a.jsonl").train == read_texts(tmp_path / "a.csv").train == expected
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_texts(tmp_path / "a.parquet").train == expected


BAD_JSONL = [
    ("", "expected at least one row, found none"),
    ('{"prompt": "a"}', r":1: expected prompt and answer, found \['prompt'\]"),
    ("\n{", ":2: expected JSON: "),
    ("[1]", ":1: expected prompt and answer, found list"),
    ('{"completion": "a"}', r":1: expected prompt and answer, found \['completion'\]"),
    (
        '{"prompt": "a", "answer": "b", "completion": "c"}',
        ":1: expected prompt and one of answer and completion, found both",
    ),
    ('{"prompt": "a", "answer": 3}', ":1: prompt, answer and choices must be text, got 3"),
    ('{"prompt": "a", "answer": "b", "choices": 3}', ":1: choices must be a list, got 3"),
    ('{"prompt": "a", "answer": "b", "choices": {"b": 1, "c": 2}}', ":1: choices must be a list, got {'b': 1"),
    ('{"prompt": "", "answer": "b"}', ":1: prompt and answer must not be empty"),
    ('{"prompt": "a", "answer": "\\t "}', ":1: prompt and answer must not be empty"),
    ('{"prompt": "a", "answer": "b", "choices": ["c", "d"]}', "answer must be one of the choices"),
    ('{"prompt": "a", "answer": "b", "choices": ["b"]}', "choices must be two or more different ones"),
    ('{"prompt": "a", "answer": "b", "choices": ["b", " "]}', "choices must not be empty"),
    ('{"prompt": "a", "answer": "b", "answer": "c"}', ":1: expected JSON: the name 'answer' stands twice"),
    ('{"prompt": "a\\u0000", "answer": "b"}', ":1: text must have neither NUL"),
    ('{"prompt": "a\\ud800", "answer": "b"}', "half a surrogate pair, got 'a.ud800'"),
    ("[" * 100_000, ":1: expected JSON: brackets are nested too deeply"),
    ('{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer": "b", "choices": "b|c"}', "every example or for none"),
]


@pytest.mark.parametrize(("content", "message"), BAD_JSONL, ids=[m[:40] for _, m in BAD_JSONL])
def test_bad_rows_are_named(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_texts(tmp_path / "a.jsonl")


HEAD = b"prompt,answer\n"
BAD_CSV = [
    (
        HEAD + b"who?,Ada, Countess of Lovelace\n",
        r":2: expected 2 values \(prompt, answer\), found 3; a value with a comma",
    ),
    (HEAD + b'"two\nlines",x\n\nonly one\n', ":5: expected 2 values .*, found 1"),
    (HEAD + b'a,b\n"never closed,b\nc,d\n', ":3: expected CSV with commas and double quotes: unexpected end of data"),
    (HEAD + b'"a"b,c\n', ":2: expected CSV with commas and double quotes: "),
    (b"prompt,answer,answer\na,b,c\n", r":1: expected columns of different names, found \['answer'\]"),
    (
        b"prompt,answer,completion\na,b,c\n",
        ":1: expected the columns prompt and one of answer and completion, found both",
    ),
    (b"prompt;answer\na;b\n", r":1: expected the columns prompt and answer, found \['prompt;answer'\]"),
    (HEAD, "expected at least one row, found none"),
    (b"", "expected at least one row, found none"),
    (HEAD + b"a,b\nc\xe9,d\n", ":3: expected UTF-8 text: .*; save the file as UTF-8"),
    ("prompt,answer\na,b\n".encode("utf-16"), ":1: expected UTF-8 text"),
    (HEAD + b"a\0,b\n", ":2: text must have neither NUL"),
    (b"prompt,answer,choices\na,b,b|c|\n", r":2: choices must not be empty, got \['b', 'c', ''\]"),
    (b'prompt,answer,choices\na,b,"[1"\n', ":2: choices must be a JSON list or words between"),
]


@pytest.mark.parametrize(("content", "message"), BAD_CSV, ids=[m[:40] for _, m in BAD_CSV])
def test_bad_csv_is_named_by_line(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_texts(tmp_path / "a.csv")


def test_long_and_awkward_text_is_read_whole(tmp_path):
    """Longer than the csv module's limit, quotes inside, other line ends, a byte order mark: all as in the other format."""
    long, quoted = "x" * 200_000, 'six" by "four", and\r\na line'
    examples = (Example(long, "b"), Example(quoted, "no \u2028 end"))
    rows = [f'"{e.prompt.replace(chr(34), chr(34) * 2)}",{e.answer},unused' for e in examples]
    limit = csv.field_size_limit()
    (tmp_path / "a.CSV").write_bytes(("\ufeff" + "\r\n".join(["prompt,answer,note", *rows])).encode())
    assert read_texts(tmp_path / "a.CSV").train == examples
    assert csv.field_size_limit() == limit
    lines = [json.dumps({"prompt": e.prompt, "answer": e.answer}, ensure_ascii=False) for e in examples]
    (tmp_path / "a.jsonl").write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    assert read_texts(tmp_path / "a.jsonl").train == examples


def test_bad_parquet_is_named(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(ValueError, match=r"a.parquet: expected a Parquet file"):
        read_texts(tmp_path / "a.parquet")
    columns = pyarrow.array(["a", "b"]), pyarrow.array(["c", None])
    parquet.write_table(pyarrow.table(columns, ["prompt", "answer"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: row 2: prompt, answer and choices must be text, got None"):
        read_texts(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table(columns, ["prompt", "prompt"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: expected the columns prompt and answer"):
        read_texts(tmp_path / "a.parquet")


def test_two_files_for_one_split_are_refused(tmp_path):
    for name in ("train.jsonl", "valid.csv", "val.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=r"expected one file for val, found \['val.jsonl', 'valid.csv'\]"):
        read_texts(tmp_path)


def test_draws_do_not_overlap_and_share_their_test():
    draws = [draw(DATA, seed, train=20, val=10, test=15) for seed in (0, 0, 1)]
    assert draws[0] == draws[1]
    assert draws[0].test == draws[2].test
    assert draws[0].train != draws[2].train
    parts = [*draws[0].train, *draws[0].val, *draws[0].test]
    assert len(parts) == 45
    index = {id(example) for example in parts}
    assert len(index) == 45
    with pytest.raises(
        ValueError, match="70 training and 10 validation examples were asked for, 65 are there beside 15"
    ):
        draw(DATA, 0, train=70, val=10, test=15)


def test_texts_from_a_function(tmp_path):
    (tmp_path / "my_texts.py").write_text(
        "from ctkernels.lab.jola import Example, TextData\n"
        "def make():\n"
        "    return TextData((Example('a', 'b'),), source='mine')\n"
    )
    assert read_texts(f"{tmp_path / 'my_texts.py'}:make").source == "mine"
    with pytest.raises(ValueError, match=r"wordnet is now examples.data:wordnet"):
        read_texts("wordnet")


def test_names_of_datasets_are_read(tmp_path):
    """A folder takes the place of the hub."""
    pytest.importorskip("datasets", reason="names of the hub need ctkernels[trainers]")
    (tmp_path / "qa").mkdir()
    rows = [{"prompt": "The sky is", "completion": " blue.", "more": i} for i in range(3)]
    for split, count in (("train", 3), ("test", 1)):
        (tmp_path / "qa" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
    data = read_texts(f"datasets:{tmp_path / 'qa'}")
    assert data.train == (Example("The sky is", " blue."),) * 3
    assert (data.val, len(data.test), data.source) == (None, 1, f"datasets:{tmp_path / 'qa'}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(
        ValueError, match=r"train: expected the columns prompt and answer, found \['question', 'answer'\]"
    ):
        read_texts(f"datasets:{tmp_path / 'other'}")
    with pytest.raises(ValueError, match=r"data 'datasets:.*gone': datasets.load_dataset raised "):
        read_texts(f"datasets:{tmp_path / 'gone'}")
    for name in ("datasets:", "datasets: ", "datasets::plain"):
        with pytest.raises(ValueError, match="data must be datasets:NAME or datasets:NAME:CONFIG"):
            read_texts(name)


def test_texts_with_a_class_label_are_prompts_with_answers(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="names of the hub need ctkernels[trainers]")
    from ctkernels.lab import load_data

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    columns = {"text": ["it bored me", "it moved me"], "label": [0, 1]}
    whole = datasets.DatasetDict(train=datasets.Dataset.from_dict(columns, features=features))
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: asked.append(names) or whole)
    assert read_texts("datasets:user/reviews:short").train == (
        Example("it bored me", "bad"),
        Example("it moved me", "good"),
    )
    assert asked == [("user/reviews", "short")]
    assert load_data("datasets:reviews").train.classes == ("bad", "good")
    assert asked[1:] == [("reviews", None)]


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"ctkernels\[trainers\]"):
        read_texts("datasets:reviews")
