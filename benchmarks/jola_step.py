"""A JoLA training step on a Llama (a small one on a CPU), end to end, against the frozen model and peft's LoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from . import measure
from .report import table


@dataclass(frozen=True)
class Size:
    """Sizes of the Llama and of the batch."""

    batch: int
    tokens: int
    layers: int
    hidden: int
    heads: int
    dtype: torch.dtype

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        of = f"{self.layers} layers, hidden {self.hidden}, {self.heads} heads"
        return f"Llama of {of}, batch {self.batch} x {self.tokens}, {kind}"


SIZES = {"cpu": Size(8, 256, 8, 512, 16, torch.float32), "cuda": Size(8, 1024, 16, 2048, 16, torch.bfloat16)}
PROCESSES = 5
YARDSTICK = "frozen, forward + backward to the embeddings"
FLOOR = "frozen, forward + backward to the first edit"
LORA, LOOP = "LoRA r=8 step", "loop over heads, step"
INSIDE = "JoLA step, edits inside attention"
APART = "JoLA step, edits in passes of their own"
JOLA, COMPILED, COMPOSED = "JoLA step", "JoLA step, compiled", "JoLA step, composed reference, compiled"


class LoopOverHeads(nn.Module):
    """A projection with the published edit of its input, in a loop over heads."""

    def __init__(self, base: nn.Module, heads: int, head_dim: int) -> None:
        super().__init__()
        self.base = base
        self.m, self.a = (nn.Parameter(1e-3 * torch.randn(heads, head_dim)) for _ in range(2))
        self.log_g1, self.log_g2 = (nn.Parameter(torch.zeros(heads, 1)) for _ in range(2))

    def gate(self, log_alpha: Tensor) -> Tensor:
        u = torch.rand_like(log_alpha)
        s = torch.sigmoid((u.log() - (1 - u).log() + log_alpha) / 0.33)
        return (s * 1.2 - 0.1).clamp(0, 1)

    def forward(self, z: Tensor) -> Tensor:
        count, dim = self.m.shape
        heads = []
        for h in range(count):
            head = z[..., h * dim : (h + 1) * dim].clone()
            g_m, g_a = self.gate(self.log_g2[h]), self.gate(self.log_g1[h])
            heads.append((1 + g_m * self.m[h]) * head + g_a * self.a[h])
        return self.base(torch.cat(heads, -1).to(z.dtype))


def llama(size: Size, device: str = "cpu", like: nn.Module | None = None) -> Any:
    """A frozen Llama; shares the weights of ``like`` if given, so that no contestant has a better memory placement."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=4 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        vocab_size=2048,
        max_position_embeddings=size.tokens,
        attention_bias=True,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).to(size.dtype).requires_grad_(False)
    if like is not None:
        model.load_state_dict(like.state_dict(), assign=True)
    return model


def run(seconds: float, quick: bool = False, device: str = "cpu") -> dict[str, Any]:
    """Milliseconds of each contestant's training step, and of merged and plain inference (``quick``: in one process)."""
    count = 1 if quick or device != "cpu" else PROCESSES
    size = str(SIZES[device])
    return {"op": "jola_step", "size": size, **measure.over_processes(count, _run, device, seconds, quick)}


def _run(seed: int, device: str, seconds: float, quick: bool) -> dict[str, Any]:
    """Medians of one process. ``FLOOR`` is the cost with free edits of any method whose first edit is where JoLA's is. The
    compiled contestants run in a separate group after the others, with an eager one; not in a quick run.
    """
    from peft import LoraConfig, get_peft_model

    from ctkernels.adapters import JolaConfig, fuse_attention, jola_penalty, parameter_groups

    size, on_cpu = SIZES[device], device == "cpu"
    wait = None if on_cpu else torch.cuda.synchronize
    ids = torch.randint(2048, (size.batch, size.tokens), generator=torch.Generator().manual_seed(1)).to(device)
    frozen = llama(size, device)
    floored, jola, lora, loop, inside = (llama(size, device, frozen) for _ in range(5))
    jola, inside = (get_peft_model(model, JolaConfig(task_type="CAUSAL_LM")) for model in (jola, inside))
    lora = get_peft_model(lora, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for layer in loop.model.layers:
        layer.self_attn.o_proj = LoopOverHeads(layer.self_attn.o_proj, size.heads, size.hidden // size.heads).to(device)
    for model in (jola, lora, loop, inside):
        model.train()
    jola_optimizer, inside_optimizer = (torch.optim.AdamW(parameter_groups(m, lr=1e-3)) for m in (jola, inside))
    optimizers = {m: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-3) for m in (lora, loop)}

    def yardstick() -> None:
        embedded = frozen.get_input_embeddings()(ids).requires_grad_()
        loss = frozen(inputs_embeds=embedded, labels=ids).loss
        torch.autograd.grad(loss, embedded)

    edited: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor]) -> Tensor:
        edited[:] = [args[0].detach().requires_grad_()]
        return edited[0]

    floored.model.layers[0].self_attn.o_proj.register_forward_pre_hook(keep)

    def floor() -> None:
        torch.autograd.grad(floored(input_ids=ids, labels=ids).loss, edited)

    def step(model: Any, optimizer: torch.optim.Optimizer, penalized: Any = None) -> Callable[[], None]:
        def call() -> None:
            loss = model(input_ids=ids, labels=ids).loss
            if penalized is not None:
                loss = loss + 0.1 * jola_penalty(penalized)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return call

    eager = step(jola, jola_optimizer, jola)
    steps: measure.Contestants = {
        YARDSTICK: yardstick,
        FLOOR: floor,
        JOLA: eager,
        LORA: step(lora, optimizers[lora]),
        LOOP: step(loop, optimizers[loop]),
    }
    if not on_cpu:  # on a CPU it is torch's attention followed by the edit
        fuse_attention(inside)
        steps[INSIDE] = step(inside, inside_optimizer, inside)
        steps[APART] = _apart(eager)
    record: dict[str, Any] = {
        "training_ms": measure.interleaved(steps, seconds * 12, seldom=[LOOP], seed=seed, wait=wait)
    }
    if not on_cpu:
        record["training_peak_bytes"] = {name: measure.peak_bytes(run) for name, run in steps.items()}
    if not quick:
        compiled, seen_through = (step(torch.compile(jola, fullgraph=True), jola_optimizer, jola) for _ in range(2))
        contestants = {JOLA: eager, COMPILED: compiled, COMPOSED: measure.composed(seen_through)}
        record["compiled_training_ms"] = measure.interleaved(contestants, seconds * 8, seed=seed, wait=wait)
        torch.compiler.reset()
    jola.eval()
    merged = jola.merge_and_unload()
    frozen.eval()

    def infer(model: Any) -> Callable[[], None]:
        def call() -> None:
            with torch.no_grad():
                model(input_ids=ids)

        return call

    inferences: measure.Contestants = {"plain": infer(frozen), "merged": infer(merged)}
    record["inference_ms"] = measure.interleaved(inferences, seconds * 3, seed=seed, wait=wait)
    return record


def _apart(call: Callable[[], None]) -> Callable[[], None]:
    """The call without edits in the weights of projections."""
    from ctkernels.ops.head_edit_linear import cost_model

    def patched() -> None:
        with mock.patch.object(cost_model, "choose", return_value=cost_model.SEPARATE):
            call()

    return patched


def bars(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The ratios that have bounds, with these."""
    t, i, c = record["training_ms"], record["inference_ms"], record.get("compiled_training_ms")
    rows = [
        measure.bar("fp32", "JoLA training step / frozen forward+backward", t[JOLA] / t[YARDSTICK], "<=", 1.06),
        measure.bar("fp32", "LoRA r=8 step / JoLA step", t[LORA] / t[JOLA], ">=", 1.05),
        measure.bar("fp32", "merged inference / plain inference", i["merged"] / i["plain"], "<=", 1.03),
    ]
    if c is not None:
        rows += [
            measure.bar("fp32", "JoLA step: compiled / eager", c[COMPILED] / c[JOLA], "<=", 1.0),
            measure.bar(
                "fp32", "JoLA step: composed reference, compiled / ours, compiled", c[COMPOSED] / c[COMPILED], ">=", 1.0
            ),
        ]
    return rows


def text(record: dict[str, Any]) -> str:
    """The record as a table."""
    rows = [
        [name, f"{ms:.1f}", f"{ms / record['training_ms'][YARDSTICK]:.3f}"]
        for name, ms in record["training_ms"].items()
    ]
    rows += [
        [f"beside compiled: {name}", f"{ms:.1f}", ""] for name, ms in record.get("compiled_training_ms", {}).items()
    ]
    rows += [[f"inference, {name}", f"{ms:.1f}", ""] for name, ms in record["inference_ms"].items()]
    rows += [
        [f"peak, MiB: {name}", f"{b / 2**20:.0f}", ""] for name, b in record.get("training_peak_bytes", {}).items()
    ]
    return f"{record['size']}\n{table(['', 'ms', '/ yardstick'], rows)}"
