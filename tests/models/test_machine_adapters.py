"""A tiny language model with JoLA and LoRA on one projection, in any order of what peft can do: merged it keeps up with a twin
that is never merged, and unloaded it is bitwise the original."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis", reason="needs the test extra")
peft = pytest.importorskip("peft", reason="needs the adapters extra")
transformers = pytest.importorskip("transformers", reason="needs the adapters extra")
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule  # noqa: E402
from machines import assert_same_state, dated, noise, profile  # noqa: E402

from ctkernels.adapters import JolaConfig, fuse_attention, save_adapter  # noqa: E402

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.randint(3, 32, (2, 5), generator=torch.Generator().manual_seed(5))
# Two layers in float64, logits of a size below 10. A merged weight is rounded where it is added to and where it is used, sums of
# at most 24 products in each of fourteen projections; unmerging takes away what was added, and leaves an ulp of the larger each
# time.
ALLOWED = 1e-11
NAMES = ("default", "second", "third")


def base():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return transformers.LlamaForCausalLM(config).double().eval()


def configuration(method):
    if method == "JoLA":
        return JolaConfig(task_type="CAUSAL_LM", init_std=0.3)
    return peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["o_proj"], init_lora_weights=False)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


class AdapterMachine(RuleBasedStateMachine):
    """``model`` may be merged, ``twin`` never is; all else is done to both. ``levels``: the adapted models, outermost first."""

    def __init__(self):
        super().__init__()
        warnings.simplefilter("ignore")
        self.levels: list[tuple[Any, Any]] = []
        self.merged = False
        self.bases = (base(), base())
        self.fused: Any = None
        self.lora = False

    @initialize(
        order=st.sampled_from((("JoLA",), ("LoRA",), ("JoLA", "LoRA"), ("LoRA", "JoLA"))), seed=st.integers(0, 99)
    )
    def attach(self, order, seed):
        pair = self.bases
        for method in order:
            pair = tuple(peft.get_peft_model(model, configuration(method)).eval() for model in pair)  # type: ignore[assignment]
            self.levels.insert(0, pair)
        self.lora = "LoRA" in order
        self._same_values("", seed)

    def _same_values(self, name, seed):
        """Random values in every adapter (called ``name``), the same in the model and its twin."""
        ours, theirs = (dict(level.named_parameters()) for level in self.levels[0])
        assert list(ours) == list(theirs)
        for i, (key, value) in enumerate(ours.items()):
            if ("jola_" in key or "lora_" in key) and (not name or f".{name}" in key):
                drawn = noise(value, seed + i) * 2
                if "log_alpha" in key:
                    drawn = (drawn + 1.0) / 10  # in units of the gates' rate
                for parameter in (value, theirs[key]):
                    parameter.data.copy_(drawn)

    @property
    def alone(self):
        """Neither merged nor stacked: peft tells the adapters of a stack apart by their names alone, and deletes both."""
        return not self.merged and len(self.levels) == 1

    @property
    def outer(self):
        return self.levels[0]

    # ---- merging ----

    @precondition(lambda self: not self.merged)
    @rule(safe=st.booleans())
    def merge(self, safe):
        self.outer[0].merge_adapter(safe_merge=safe)
        self.merged = True

    @precondition(lambda self: self.merged)
    @rule()
    def unmerge(self):
        self.outer[0].unmerge_adapter()
        self.merged = False

    # ---- adapters ----

    @precondition(lambda self: self.alone and len(self.outer[0].peft_config) < len(NAMES))
    @rule(seed=st.integers(0, 99))
    def add(self, seed):
        name = next(n for n in NAMES if n not in self.outer[0].peft_config)
        for model in self.outer:
            config = next(iter(model.peft_config.values()))
            model.add_adapter(name, copy.deepcopy(config))
        self._same_values(name, seed)

    @precondition(lambda self: not self.merged)
    @rule(which=st.integers(0, 2))
    def switch(self, which):
        names = sorted(self.outer[0].peft_config)
        for model in self.outer:
            model.set_adapter(names[which % len(names)])

    @precondition(lambda self: self.alone and len(self.outer[0].peft_config) > 1)
    @rule(which=st.integers(0, 2))
    def delete(self, which):
        names = sorted(self.outer[0].peft_config)
        gone = names[which % len(names)]
        for model in self.outer:
            model.delete_adapter(gone)
            model.set_adapter(next(n for n in names if n != gone))

    @rule(seed=st.integers(0, 99))
    def train_a_step(self, seed):
        if not self.merged:
            self._same_values(sorted(self.outer[0].peft_config)[0], seed)

    @precondition(lambda self: not self.merged)
    @rule(seed=st.integers(0, 99))
    def write_the_base(self, seed):
        for model in self.bases:
            projection = model.model.layers[0].self_attn.o_proj
            while hasattr(projection, "base_layer"):
                projection = projection.base_layer
            projection.weight.data.add_(noise(projection.weight, seed))

    # ---- files and copies ----

    @precondition(lambda self: self.alone and len(self.outer[0].peft_config) < len(NAMES))
    @rule()
    def save_and_load(self):
        name = next(n for n in NAMES if n not in self.outer[0].peft_config)
        active = self.outer[0].active_adapter
        with tempfile.TemporaryDirectory() as folder:
            if isinstance(self.outer[0].peft_config[active], JolaConfig):
                save_adapter(self.outer[0], folder, adapter_name=active)
            else:
                self.outer[0].save_pretrained(folder, selected_adapters=[active])
            # peft puts an adapter that is not called "default" into a folder of its name
            inner = f"{folder}/{active}"
            for model in self.outer:
                model.load_adapter(inner if os.path.isdir(inner) else folder, name)
        for model in self.outer:
            before = logits(model)
            model.set_adapter(name)
            if model is self.outer[1]:
                assert torch.equal(logits(model), before)

    @rule()
    def deepcopy(self):
        copied = copy.deepcopy(self.outer[0])
        assert torch.equal(logits(copied), logits(self.outer[0]))

    @rule()
    def disable(self):
        model, twin = self.outer
        merged = self.merged
        with twin.disable_adapter():
            expected = logits(twin)
        with model.disable_adapter():
            self._close(logits(model), expected)
        if merged:  # disabled, it was unmerged: peft's way
            self.merged = False

    @precondition(lambda self: not self.merged)
    @rule()
    def cast_there_and_back(self):
        # half the digits are lost, in both
        for model in self.outer:
            model.float().double()

    @rule()
    def fused_attention(self):
        if self.fused is not None:
            self.fused.remove()
            self.fused = None
        elif any(isinstance(c, JolaConfig) for model, _ in self.levels for c in model.peft_config.values()):
            self.fused = fuse_attention(self.outer[0])

    # ---- what has to hold ----

    @invariant()
    def compare(self):
        if self.levels:
            model, twin = self.outer
            self._close(logits(model), logits(twin))

    def _close(self, got, expected):
        off, bound = (got - expected).abs().max().item(), ALLOWED * (1 + expected.abs().max().item())
        assert off <= bound, f"off by {off:.3g} of {expected.abs().max().item():.3g}, allowed {bound:.3g}"

    def teardown(self):
        if not self.levels:
            return
        if self.fused is not None:
            self.fused.remove()
        if self.merged:
            self.unmerge()
        self.compare()
        if len(self.levels) > 1:  # peft does not unload one adapted model out of another
            return
        model, twin = (level.unload() for level in self.outer)
        if not self.lora:  # LoRA subtracts what it added
            assert_same_state(model, twin)


TestAdapters = dated(AdapterMachine).TestCase
TestAdapters.settings = profile(examples=8, steps=8)
