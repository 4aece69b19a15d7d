"""Every public context while other threads run: another model, and the same one. Nothing leaks from one to the other."""

from __future__ import annotations

import contextlib
import threading
import time
import warnings

import pytest
import torch
from torch import Tensor, nn

import ctkernels

ROUNDS = 25
pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.relu(self.norm(self.conv(x))).mean((2, 3)))


def net(seed):
    torch.manual_seed(seed)
    return Net().eval().requires_grad_(False)


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@contextlib.contextmanager
def running(call, expected, atol=0.0):
    """``call`` over and over in a thread of its own; what it gave that is none of ``expected``, and what it raised."""
    wrong: list[str] = []
    calls, stop = 0, threading.Event()
    started = threading.Event()

    def work():
        nonlocal calls
        warnings.simplefilter("ignore")
        with torch.no_grad():
            while not stop.is_set():
                try:
                    got = call()
                    if not any(bool(((got - e).abs() <= atol).all()) for e in expected):
                        wrong.append(f"off by {min((got - e).abs().max().item() for e in expected):.3g}")
                except Exception as error:
                    wrong.append(f"{type(error).__name__}: {error}")
                calls += 1
                started.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(60)
    try:
        yield wrong
    finally:
        before = calls
        while calls < before + 2 and thread.is_alive():  # at least once after all that was done beside it
            time.sleep(0.001)
        stop.set()
        thread.join(60)
    assert not thread.is_alive()


def _steer_and_fuse(model):
    handle = ctkernels.steer(model, 0.7)
    with ctkernels.fuse(model):
        model(X)
    handle.remove()


def _steer_alone(model):
    with ctkernels.steer(model, 0.7):
        model(X)


def _backends(model):
    x = torch.linspace(-3, 3, 50)
    with ctkernels.use_backend("reference"):
        ctkernels.functional.ctu(x, 0.9)


@pytest.mark.parametrize("act", [_steer_and_fuse, _steer_alone, _backends], ids=["fuse", "steer", "use_backend"])
def test_another_model_beside(act):
    """A plain model is served while another one is steered, fused, and given back."""
    served, other = net(0), net(1)
    with running(lambda: served(X), [served(X)]) as wrong:
        for _ in range(ROUNDS):
            act(other)
    assert not wrong, wrong[:3]


def test_a_steered_and_fused_model_beside():
    served, other = net(0), net(1)
    ctkernels.steer(served, 0.9)
    ctkernels.fuse(served)
    with torch.no_grad():
        expected = served(X)
    with running(lambda: served(X), [expected]) as wrong:
        for _ in range(ROUNDS):
            _steer_and_fuse(other)
    assert not wrong, wrong[:3]


def test_no_backend_stays_forced():
    """Contexts that two threads enter in one order and leave in another: in the end nothing is forced."""
    x = torch.linspace(-3, 3, 50)
    entered, leave = threading.Event(), threading.Event()

    def other():
        with ctkernels.use_backend("reference"):
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with ctkernels.use_backend("reference"):
        thread.start()
        assert entered.wait(60)
    leave.set()
    thread.join(60)
    assert "forced" not in ctkernels.explain(x)


def test_the_same_model_while_knobs_are_set():
    """Each call sees one of the values that were set."""
    model = net(0)
    handle = ctkernels.steer(model, 0.5)
    outputs = []
    for beta in (0.5, 0.9):
        handle.beta = beta
        outputs.append(model(X))
    with running(lambda: model(X), outputs) as wrong:
        for i in range(20 * ROUNDS):
            handle.beta = (0.5, 0.9)[i % 2]
    assert not wrong, wrong[:3]


def test_the_same_model_in_two_threads_fused():
    """A fused model is called by two threads at once, and its weights change between calls of each."""
    model = net(0)
    ctkernels.steer(model, 0.9)
    ctkernels.fuse(model)
    with torch.no_grad():
        expected = model(X)
        with running(lambda: model(X), [expected]) as wrong:
            for _ in range(10 * ROUNDS):
                assert torch.equal(model(X), expected)
        assert not wrong, wrong[:3]


def test_the_same_model_while_it_is_steered_and_fused():
    """Calls that come between see the plain, the steered, or the fused model, each within rounding."""
    model = net(0)
    plain = model(X)
    with ctkernels.steer(model, 0.7):
        steered = model(X)
    with running(lambda: model(X), [plain, steered], atol=1e-5) as wrong:
        for _ in range(ROUNDS):
            _steer_and_fuse(model)
    assert not wrong, wrong[:3]
    assert torch.equal(model(X), plain)


# ---- adapters ---------------------------------------------------------------------------------------------------------


def language_model(seed=0):
    transformers = pytest.importorskip("transformers", reason="needs the adapters extra")
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return transformers.LlamaForCausalLM(config).eval()


def adapted(seed=0):
    peft = pytest.importorskip("peft", reason="needs the adapters extra")
    from ctkernels.adapters import JolaConfig

    return peft.get_peft_model(language_model(seed), JolaConfig(task_type="CAUSAL_LM", init_std=0.5)).eval()


IDS = torch.randint(3, 32, (2, 5), generator=torch.Generator().manual_seed(5))


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def test_an_adapter_is_disabled_beside_another_model():
    served, other = adapted(0), adapted(1)
    with running(lambda: logits(served), [logits(served)]) as wrong:
        for _ in range(ROUNDS):
            with other.disable_adapter():
                logits(other)
    assert not wrong, wrong[:3]


def test_attention_is_fused_beside_another_model():
    served, other = adapted(0), adapted(1)
    from ctkernels.adapters import fuse_attention

    with running(lambda: logits(served), [logits(served)]) as wrong:
        for _ in range(ROUNDS):
            handle = fuse_attention(other)
            logits(other)
            handle.remove()
    assert not wrong, wrong[:3]


def test_fused_attention_gives_each_thread_its_edit_once(monkeypatch):
    """Two threads are between attention and projection of one layer at the same time."""
    model = adapted()
    from ctkernels.adapters import JolaLayer, fuse_attention

    inputs = (IDS, IDS.flip(1))
    fuse_attention(model)
    expected = [logits(model, ids) for ids in inputs]
    meet, forward = threading.Barrier(2), JolaLayer.forward

    def waiting(self, *args, **kwargs):
        meet.wait(60)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(JolaLayer, "forward", waiting)
    found: dict[int, Tensor] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: logits(model, inputs[i])})) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i, value in enumerate(expected):
        torch.testing.assert_close(found[i], value, rtol=1e-5, atol=1e-6)
