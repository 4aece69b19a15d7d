"""The report page: every kind of result, nothing injected, clear errors, and what a browser makes of it."""

import copy
import html.parser
import json
import os
import random
import re

import pytest

from ctkernels import cli

pytest.importorskip("jinja2", reason="the report needs Jinja2")
pytest.importorskip("matplotlib", reason="the report needs matplotlib")

from browser import chromium, least_contrast
from report_samples import EVIL, SAMPLES

from ctkernels.lab.report.page import build, find_results, read_section

VOID = {"meta", "link", "img", "br", "hr"}


class Checker(html.parser.HTMLParser):
    """Collects what a page holds, and fails on tags that are not closed in order."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.ids, self.text, self.images = [], [], [], [], []
        self.links, self.loads = [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "img":
            self.images.append(attributes)
        if tag == "a":
            self.links.append(attributes["href"])
        self.loads += [v for k, v in attrs if k in ("src", "srcset", "data") or (k == "href" and tag == "link")]
        assert not any(k.startswith("on") for k in attributes), attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    for name, sample in SAMPLES.items():
        (folder / name).mkdir()
        (folder / name / "result.json").write_text(json.dumps(sample()))
    return folder


@pytest.fixture(scope="module")
def page(files, tmp_path_factory):
    return build([files], tmp_path_factory.mktemp("report"))


def test_every_kind_of_result_is_on_the_page(page):
    found = Checker(page.read_text(encoding="utf-8"))
    text = " ".join(" ".join(found.text).split())
    for part in (
        "from 10 result files",
        "Steering helped here: beta = 0.85 scored",
        "One β for all activations: resnet18 on photos",
        "One β for all activations, 2 draws of images",
        "2 β, coordinate search",
        "the chosen betas were found by number 3",
        "mobilenet_v2 on fashion-mnist: mean ± deviation over seeds",
        "T-CT, seed 42: learned values by layer",
        "Editing attention heads (JoLA) beside other methods",
        "one adapter trained in sequence lost 18.5 points on average on the 1 earlier task; the router found the task of 99.5 %",
        "tax: the adapter, 70.0, is not above zero-shot, 70.0.",
        "ℓ∞ 8/255, S-CT at beta = 0.8: it helped",
        "Curvature and slope",
        "LoRA, rank 1",
        "ctu, forward, milliseconds",
        "Where it did not help",
        "mobilenet_v2 on fashion-mnist, LoRA, rank 1 against linear probe: worse, -5.0 ± 2.0 points.",
        "mobilenet_v2 on fashion-mnist, S-CT against linear probe: no difference beyond chance",
        "corruptions, S-CT: steering did not help.",
        "python -m ctkernels steer photos/ --model resnet18",
        "python examples/demo_steering.py --short",
        "python -m benchmarks --tuned",
    ):
        assert part in text, part
    assert len(found.ids) == len(set(found.ids))
    assert all(link[0] == "#" and link[1:] in found.ids for link in found.links)
    assert "script" not in found.tags


def test_the_page_loads_nothing_and_describes_its_pictures(page):
    source = page.read_text(encoding="utf-8")
    found = Checker(source)
    assert len(found.images) > 15
    assert all(load.startswith(("data:image/", "data:,")) for load in found.loads)
    assert all(len(image["alt"]) > 20 for image in found.images)
    assert not re.search(r"@import|url\(|http-equiv", source)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in source


def test_the_same_results_give_the_same_page(files, tmp_path):
    once, again = (build([files / "search_beta"], tmp_path / name) for name in ("a", "b"))
    assert once.read_bytes() == again.read_bytes()


def evil(value):
    """Every text that does not steer the reader made a script, keys of named things too."""
    kept = ("schema", "kind", "method", "op", "dtype", "parameters", "case", "name", "model", "data", "primary")
    if isinstance(value, dict):
        return {k: v if k in kept and isinstance(v, str) else evil(v) for k, v in value.items()}
    if isinstance(value, list):
        return [evil(v) for v in value]
    return EVIL if isinstance(value, str) else value


@pytest.mark.parametrize("name", SAMPLES)
def test_nothing_is_injected(name, tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(evil(SAMPLES[name]())))
    source = build([tmp_path / "result.json"], tmp_path / "out", title=EVIL).read_text(encoding="utf-8")
    found = Checker(source)
    assert "script" not in found.tags
    assert EVIL not in source
    assert EVIL in "".join(found.text)


def test_names_are_escaped_and_cannot_break_pictures(tmp_path):
    values = SAMPLES["compare"]()
    name = f'a$b_{{^"{EVIL}'
    text = (
        json.dumps(values)
        .replace("fashion-mnist", json.dumps(name)[1:-1])
        .replace("layer1.0.relu", json.dumps(name)[1:-1])
    )
    (tmp_path / "result.json").write_text(text)
    found = Checker(build([tmp_path], tmp_path / "out").read_text(encoding="utf-8"))
    assert "script" not in found.tags
    assert f"mobilenet_v2 on {name}" in "".join(found.text)


def damaged(values, generator):
    """The value with something in it removed or made of another kind, where ``generator`` says."""
    values = copy.deepcopy(values)
    here = values
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        keys = [k for k in keys if k != "schema"]
        if not keys:
            return values
        key = generator.choice(keys)
        if isinstance(here[key], (dict, list)) and here[key] and generator.random() < 0.6:
            here = here[key]
            continue
        if generator.random() < 0.5:
            del here[key]
        else:
            here[key] = generator.choice([None, "x", [], {}, -1, True])
        return values


@pytest.mark.parametrize("name", SAMPLES)
def test_a_damaged_result_is_read_or_refused_by_name(name, tmp_path, monkeypatch):
    """Without each of its entries in turn, and with something inside taken out or changed."""
    monkeypatch.setattr("ctkernels.lab.report.figures.data_uri", lambda figure, kind="svg": "data:image/png;base64,")
    sample, generator, path = SAMPLES[name](), random.Random(0), tmp_path / "result.json"
    broken = [{k: v for k, v in sample.items() if k != gone} for gone in sample]
    broken += [damaged(sample, generator) for _ in range(10)]
    refused = 0
    for values in broken:
        path.write_text(json.dumps(values))
        try:
            read_section(path)
        except ValueError as error:
            refused += str(error).startswith(f"{path}: ")
    assert refused >= 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected JSON: "),
        ("{", "expected JSON: "),
        ('{"schema": NaN}', "NaN is not a number of JSON"),
        ("[1, 2]", "got a list without a schema"),
        ("{}", "got a dict without a schema"),
        ('{"schema": "other/1"}', "expected a result of .*ctkernels.robust/1.*, got schema 'other/1'"),
        ('{"schema": ["x"]}', "got a dict without a schema"),
        ('{"schema": "ctkernels.robust/1"}', "calls itself ctkernels.robust/1 but is damaged: KeyError: 'conditions'"),
        ('{"draws": []}', "damaged"),
        ("[" * 100_000, "expected JSON: brackets are nested too deeply"),
    ],
)
def test_bad_files(content, message, tmp_path, capsys):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_section(path)
    assert cli.main(["report", str(path), "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"ctkernels: error: {path}: ")
    assert not (tmp_path / "out").exists()


def test_bad_paths(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="does not exist"):
        find_results([tmp_path / "none"])
    with pytest.raises(ValueError, match=r"expected result\.json files in the folder, found none"):
        find_results([tmp_path / "empty"])
    with pytest.raises(ValueError, match="at least one file"):
        find_results([])
    with pytest.raises(ValueError, match="out must be a folder"):
        build([tmp_path / "file"], tmp_path / "file")


def test_the_command_line(files, tmp_path, capsys):
    result = str(files / "search_beta" / "result.json")
    assert cli.main(["report", result, result, "-o", str(tmp_path), "--title", "My network"]) == 0
    assert capsys.readouterr().out == f"saved {tmp_path / 'index.html'}\n"
    assert "<title>My network</title>" in (tmp_path / "index.html").read_text(encoding="utf-8")
    assert os.listdir(tmp_path) == ["index.html"]


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1280, 390, 320])
def test_in_a_browser(page, width):
    with chromium() as browser:
        context = browser.new_context(viewport={"width": width, "height": 800}, offline=True)
        tab = context.new_page()
        said, asked = [], []
        tab.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(page.as_uri())
        assert said == []
        assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
        assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert tab.evaluate("[...document.images].every(i => i.getBoundingClientRect().right <= innerWidth)")
        # a table wider than the screen scrolls in its frame, and can be reached with the keyboard
        frames = tab.evaluate(
            "[...document.querySelectorAll('.scroll')].map(f => [f.scrollWidth > f.clientWidth, f.tabIndex])"
        )
        assert all(index == 0 for _, index in frames)
        if width < 400:
            assert any(wide for wide, _ in frames)
        assert least_contrast(tab) >= 4.5
