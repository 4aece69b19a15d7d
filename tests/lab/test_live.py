"""The live page: what it says of a tiny model's inputs, who may ask, and what a browser makes of it."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from browser import chromium, least_contrast
from tiny_language_model import save_tiny_llama

from ctkernels import cli

pytest.importorskip("jinja2", reason="the live page needs Jinja2")
pytest.importorskip("matplotlib", reason="the live page needs matplotlib")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
peft = pytest.importorskip("peft")

from ctkernels.adapters import EditMonitor, JolaConfig  # noqa: E402
from ctkernels.lab.jola import load_language_model  # noqa: E402
from ctkernels.lab.live import watch  # noqa: E402
from ctkernels.lab.live.report import LiveReport  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
ROOT = Path(__file__).parents[2]
WORDS = ["red", "blue", "is", "a", "colour", "fruit", "apple", "pear", "sky", "<script>alert(1)</script>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama, and an adapter beside it."""
    path = save_tiny_llama(tmp_path_factory.mktemp("tiny"), WORDS)
    torch.manual_seed(1)
    model = peft.get_peft_model(load_language_model(path)[0], JolaConfig(task_type="CAUSAL_LM", init_std=0.5))
    model.save_pretrained(path / "adapter")
    return path


@pytest.fixture
def watched(folder):
    model, tokenizer = load_language_model(folder)
    adapted = peft.PeftModel.from_pretrained(model, folder / "adapter").eval()
    return EditMonitor(adapted, every=1, history=6, window=4), tokenizer


def _ids(tokenizer, *texts):
    return torch.tensor([tokenizer(text)["input_ids"] for text in texts])


def _get(server, path, host=None, **headers):
    request = urllib.request.Request(server.url + path, headers=headers | ({"Host": host} if host else {}))
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read().decode()


def _post(server, value, kind="application/json"):
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    request = urllib.request.Request(server.url + "texts", body, {"Content-Type": kind})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.status


def _entries(server, **query):
    return json.loads(_get(server, "feed?" + urllib.parse.urlencode(query)))["entries"]


def test_what_the_process_serves_is_shown(watched):
    monitor, tokenizer = watched
    with watch(monitor, tokenizer, port=0) as server:
        assert _entries(server) == []
        with torch.no_grad():
            monitor.model(input_ids=_ids(tokenizer, "apple is a", "red is a"))
            monitor.model(input_ids=_ids(tokenizer, "sky is blue"))
        shown = _entries(server)
        assert [entry["id"] for entry in shown] == ["2-0", "1-1", "1-0"]  # newest first
        for entry, text in zip(shown, ("sky is blue", "red is a", "apple is a")):
            assert f'<blockquote tabindex="0">{text}</blockquote>' in entry["html"]
        # the numbers are the monitor's
        inputs = monitor.recent[0]
        largest = float(inputs.mean[1].max())
        site, head = monitor.heads[int(inputs.mean[1].argmax())]
        assert f'<th scope="row">{site}</th><td>{head}</td><td>{100 * largest:.1f}</td>' in shown[1]["html"]
        assert f"The largest is {100 * largest:.1f} % of the output of head {head} of {site}." in shown[1][
            "html"
        ].replace("\n", " ")
    assert not monitor.on
    with pytest.raises(urllib.error.URLError):
        _get(server, "")


def test_what_is_being_generated_grows(watched):
    monitor, tokenizer = watched
    with watch(monitor, tokenizer, port=0) as server:
        ids = _ids(tokenizer, "apple is a")
        monitor.model.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        first = _entries(server)
        assert [(entry["id"], entry["version"]) for entry in first] == [("1-0", 3)]
        assert "5 tokens" in first[0]["html"]
        assert _entries(server, known="1-0:3") == [{"id": "1-0", "version": 3, "html": None}]
        assert _entries(server, known="1-0:2")[0]["html"] == first[0]["html"]
        assert _entries(server, dark=1)[0]["html"] != first[0]["html"]  # another picture


def test_typed_texts_are_read_and_not_counted(watched):
    monitor, tokenizer = watched
    monitor.every = 5
    with watch(monitor, tokenizer, port=0) as server, torch.no_grad():
        monitor.model(input_ids=_ids(tokenizer, "apple is a"))
        assert _post(server, {"text": "pear is <script>alert(1)</script>"}) == 200
        typed, _ = _entries(server)
        assert "<script" not in typed["html"]
        assert "pear is" in typed["html"]
        monitor.begin()
        assert monitor.snapshot().count[0] == 3  # of the one that was served
        for wrong, kind, status in (
            ({"text": " "}, "application/json", 400),
            ({"text": 3}, "application/json", 400),
            ([], "application/json", 400),
            (b"{", "application/json", 400),
            ({"text": "apple"}, "text/plain", 415),  # as a form of another site could send it
            (b"x" * 100_000, "application/json", 413),
        ):
            with pytest.raises(urllib.error.HTTPError) as raised:
                _post(server, wrong, kind)
            assert raised.value.code == status
        assert len(_entries(server)) == 2


def test_typing_does_not_break_up_what_another_thread_generates(watched):
    monitor, tokenizer = watched
    with watch(monitor, tokenizer, port=0) as server:
        report, steps = server.report, []

        def typed():
            if len(steps) == 1:  # between two tokens of the generation
                thread = threading.Thread(target=report.read, args=("sky",))
                thread.start()
                thread.join(60)
                assert not thread.is_alive()
            steps.append(1)

        processor = transformers.LogitsProcessorList([lambda ids, scores: (typed(), scores)[1]])
        monitor.model.generate(
            input_ids=_ids(tokenizer, "apple is a"),
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            logits_processor=processor,
        )
        assert len(steps) == 4
        versions = {entry["id"]: entry["version"] for entry in _entries(server)}
        assert versions == {"1-0": 4, "2-0": 1}
        monitor.begin()
        assert monitor.snapshot().inputs == 1


def test_facts_and_unusual_inputs(watched):
    monitor, tokenizer = watched
    monitor.margin = 0.0
    monitor.calibrate([{"input_ids": _ids(tokenizer, f"{word} is a")} for word in ("apple", "pear") * 4])
    with watch(monitor, tokenizer, port=0) as server, torch.no_grad():
        assert "<dt>Drift</dt><dd>no full window yet, alarm above" in json.loads(_get(server, "feed"))["facts"]
        for _ in range(5):
            monitor.model(input_ids=_ids(tokenizer, "colour colour colour colour"))
        said = json.loads(_get(server, "feed"))
        assert "<dt>Inputs counted</dt><dd>4</dd>" in said["facts"]
        assert "in the last window, alarm above" in said["facts"]
        unusual = int(monitor.beyond(monitor.recent[-1]).sum())
        assert unusual > 0
        assert f"Unusual: outside the calibrated range in {unusual} head" in said["entries"][0]["html"]


def test_only_this_machine_may_ask(watched):
    monitor, tokenizer = watched
    with watch(monitor, tokenizer, port=0) as server:
        port = int(server.url.rstrip("/").rpartition(":")[2])
        for host, status in (
            (f"localhost:{port}", 200),
            (f"127.0.0.1:{port}", 200),
            ("evil.example", 421),
            (f"evil.example:{port}", 421),
        ):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", "/feed", headers={"Host": host})
            assert connection.getresponse().status == status
            connection.close()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            _get(server, "nothing")
        with pytest.raises(OSError, match=f"cannot serve on 127.0.0.1:{port}"):
            watch(monitor, tokenizer, port=port)
    without = EditMonitor(monitor.model)
    with pytest.raises(ValueError, match="monitor must keep a history for the live page"):
        LiveReport(without, tokenizer)


def test_prometheus_can_scrape_the_page(watched):
    client = pytest.importorskip("prometheus_client.parser")
    monitor, tokenizer = watched
    with watch(monitor, tokenizer, port=0) as server, torch.no_grad():
        for _ in range(2):
            monitor.model(input_ids=_ids(tokenizer, "apple is a"))
        families = {f.name: f for f in client.text_string_to_metric_families(_get(server, "metrics"))}
    assert families["ctkernels_inputs"].samples[0].value == 1


def test_the_command_serves_reads_lines_and_stops(folder, tmp_path):
    data = [{"prompt": f"{word} is a", "answer": "fruit"} for word in WORDS[:8]]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, data)))
    arguments = ["watch", "-", "--model", str(folder), "--adapter", str(folder / "adapter"), "--port", "0"]
    arguments += ["--calibrate", str(tmp_path / "prompts.jsonl"), "--window", "4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ctkernels", *arguments]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=tmp_path, text=True
    )
    try:
        assert (
            process.stdout.readline() == f"calibrated on 8 prompts, saved {folder / 'adapter' / 'edit_monitor.json'}\n"
        )
        server = type("Server", (), {"url": process.stdout.readline().rpartition(" ")[2].strip()})
        process.stdin.write("pear is a\n\nsky is\n")
        process.stdin.flush()
        process.stdin.close()
        for _ in range(200):
            if len(shown := _entries(server)) == 2:
                break
            threading.Event().wait(0.1)
        assert "sky is" in shown[0]["html"]
        assert "pear is a" in shown[1]["html"]
        assert "Edited heads, live" in _get(server, "")
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 130
        process.stdout.close()


def test_bad_options_of_the_command(folder, tmp_path, capsys):
    (tmp_path / "few.jsonl").write_text('{"prompt": "sky is", "answer": "blue"}')
    start = ["watch", "--model", str(folder), "--adapter"]
    assert cli.main([*start, str(tmp_path)]) == 2
    assert "expected adapter_model.safetensors, found none" in capsys.readouterr().err
    assert cli.main([*start, str(folder / "adapter"), "--calibrate", str(tmp_path / "few.jsonl")]) == 2
    assert "--calibrate: drift over windows of 64 needs 128 prompts, got 1" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert cli.main([*start, str(folder / "adapter"), "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot serve on 127.0.0.1" in capsys.readouterr().err


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark"), (320, "light")])
def test_in_a_browser(watched, width, scheme):
    monitor, tokenizer = watched
    monitor.calibrate([{"input_ids": _ids(tokenizer, f"{word} is a")} for word in WORDS[:9]])
    with watch(monitor, tokenizer, port=0) as server, chromium() as browser:
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        tab = context.new_page()
        said, asked = [], []
        tab.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(server.url)
        tab.get_by_label("A text to read").fill("pear is <script>alert(1)</script>")
        tab.get_by_role("button", name="Show its edits").press("Enter")
        tab.get_by_text("Read: its edits are the first below.").wait_for(timeout=60_000)
        assert tab.locator("article blockquote").first.inner_text().startswith("pear is")
        # what the process serves appears by itself, above it
        with torch.no_grad():
            monitor.model(input_ids=_ids(tokenizer, "sky is blue"))
        tab.get_by_role("heading", name="Input 2-0").wait_for(timeout=60_000)
        headings = tab.get_by_role("heading", level=3).all_inner_texts()
        assert headings == ["Input 2-0", "Input 1-0"]
        assert said == []
        assert all(url.startswith((server.url, "data:")) for url in asked)
        assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0 && i.alt.length > 20)")
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
        assert tab.evaluate("[...document.images].every(i => i.getBoundingClientRect().right <= innerWidth)")
        assert tab.evaluate("[...document.querySelectorAll('.scroll')].every(f => f.tabIndex === 0)")
        assert least_contrast(tab) >= 4.5
        dark = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, dark[4:-1].split(","))) < 200) == (scheme == "dark")
        if os.environ.get("CTKERNELS_SCREENSHOTS"):
            tab.screenshot(path=f"{os.environ['CTKERNELS_SCREENSHOTS']}/live-{width}-{scheme}.png", full_page=True)
        server.close()
        tab.get_by_text("The process does not answer").wait_for(timeout=60_000)
