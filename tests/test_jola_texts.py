"""Prompts and answers from files, how they are drawn, and how bad rows are refused."""

import json

import pytest

from ctkernels.recipes.jola import Example, TextData, draw, read_texts
from ctkernels.recipes.jola.wordnet import wordnet_nouns

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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected at least one row, found none"),
        ('{"prompt": "a"}', r"row 1: expected prompt and answer, found \['prompt'\]"),
        ("{", "line 1 is not JSON"),
        ('{"prompt": "a", "answer": 3}', "row 1: prompt, answer and choices must be text, got 3"),
        ('{"prompt": "", "answer": "b"}', "row 1: prompt and answer must not be empty"),
        ('{"prompt": "a", "answer": "b", "choices": ["c", "d"]}', "answer must be one of the choices"),
        ('{"prompt": "a", "answer": "b", "choices": ["b"]}', "choices must be two or more different ones"),
        (
            '{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer": "b", "choices": "b|c"}',
            "every example or for none",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_texts(tmp_path / "a.jsonl")


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


def test_wordnet_is_read_from_a_file(tmp_path):
    lines = ["  1 a licence line"]
    for number, word in (
        ("04", "act"),
        ("07", "b"),
        ("09", "c"),
        ("10", "d"),
        ("26", "e"),
        ("11", "f"),
        ("14", "g"),
        ("21", "h"),
    ):
        lines += [f'0000000{i} {number} n 01 {word} 0 000 | gloss {word} {i}; "used so"  ' for i in range(3)]
    (tmp_path / "data.noun").write_text("\n".join(lines))
    data = wordnet_nouns(tmp_path, per_class=2)
    assert len(data.train) == 16
    assert data.source == f"WordNet nouns, {tmp_path}"
    assert any(e.prompt.startswith("Definition: gloss act ") and e.answer == "act" for e in data.train)
    assert not any("used so" in e.prompt for e in data.train)
    assert wordnet_nouns(tmp_path, per_class=2) == data
    with pytest.raises(ValueError, match=r"WordNet was not found:\n.*no data.noun in"):
        wordnet_nouns(tmp_path / "gone")
