"""A JoLA training step on a small Llama, end to end, against the frozen model and peft's LoRA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import measure
from .report import table

BATCH, TOKENS, LAYERS, HIDDEN, HEADS = 8, 256, 8, 512, 16
PROCESSES = 5
YARDSTICK = "frozen, forward + backward to the embeddings"
FLOOR = "frozen, forward + backward to the first edit"
LORA, LOOP = "LoRA r=8 step", "loop over heads, step"
JOLA, COMPILED, COMPOSED = "JoLA step", "JoLA step, compiled", "JoLA step, composed reference, compiled"


class LoopOverHeads(nn.Module):
    """The projection behind the published edit: one head after the other."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, dim = base, HIDDEN // HEADS
        self.m, self.a = (nn.Parameter(1e-3 * torch.randn(HEADS, dim)) for _ in range(2))
        self.log_g1, self.log_g2 = (nn.Parameter(torch.zeros(HEADS, 1)) for _ in range(2))

    def gate(self, log_alpha: Tensor) -> Tensor:
        u = torch.rand_like(log_alpha)
        s = torch.sigmoid((u.log() - (1 - u).log() + log_alpha) / 0.33)
        return (s * 1.2 - 0.1).clamp(0, 1)

    def forward(self, z: Tensor) -> Tensor:
        dim = HIDDEN // HEADS
        heads = []
        for h in range(HEADS):
            head = z[..., h * dim : (h + 1) * dim].clone()
            g_m, g_a = self.gate(self.log_g2[h]), self.gate(self.log_g1[h])
            heads.append((1 + g_m * self.m[h]) * head + g_a * self.a[h])
        return self.base(torch.cat(heads, -1))


def llama(like: nn.Module | None = None) -> Any:
    """A frozen Llama; with the weights of ``like`` where given, so that no contestant's lie better in memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=2048,
        max_position_embeddings=TOKENS,
        attention_bias=True,
    )
    model = LlamaForCausalLM(config).requires_grad_(False)
    if like is not None:
        model.load_state_dict(like.state_dict(), assign=True)
    return model


def run(seconds: float, quick: bool = False) -> dict[str, Any]:
    """Milliseconds of every contestant's training step, and of merged and plain inference (``quick``: from one process)."""
    return {"op": "jola_step", **measure.over_processes(1 if quick else PROCESSES, _run, seconds, quick)}


def _run(seed: int, seconds: float, quick: bool) -> dict[str, dict[str, float]]:
    """Medians of one process. ``FLOOR`` is what any method must do whose first learned edit is that of JoLA, were the edits
    free. The compiled contestants run among themselves after the others, beside an eager one; not in a quick run.
    """
    from peft import LoraConfig, get_peft_model

    from ctkernels.adapters import JolaConfig, jola_penalty, parameter_groups

    ids = torch.randint(2048, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
    frozen = llama()
    floored, jola, lora, loop = (llama(frozen) for _ in range(4))
    jola = get_peft_model(jola, JolaConfig(task_type="CAUSAL_LM"))
    lora = get_peft_model(lora, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for layer in loop.model.layers:
        layer.self_attn.o_proj = LoopOverHeads(layer.self_attn.o_proj)
    for model in (jola, lora, loop):
        model.train()
    jola_optimizer = torch.optim.AdamW(parameter_groups(jola, lr=1e-3))
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

    def step(
        model: Any, optimizer: torch.optim.Optimizer, penalty: Callable[[], Tensor] | None = None
    ) -> Callable[[], None]:
        def call() -> None:
            loss = model(input_ids=ids, labels=ids).loss
            if penalty is not None:
                loss = loss + penalty()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return call

    def penalty() -> Tensor:
        return 0.1 * jola_penalty(jola)

    eager = step(jola, jola_optimizer, penalty)
    training = measure.interleaved(
        {
            YARDSTICK: yardstick,
            FLOOR: floor,
            JOLA: eager,
            LORA: step(lora, optimizers[lora]),
            LOOP: step(loop, optimizers[loop]),
        },
        seconds * 12,
        seldom=[LOOP],
        seed=seed,
    )
    record = {"training_ms": training}
    if not quick:
        compiled, seen_through = (step(torch.compile(jola, fullgraph=True), jola_optimizer, penalty) for _ in range(2))
        contestants = {JOLA: eager, COMPILED: compiled, COMPOSED: measure.composed(seen_through)}
        record["compiled_training_ms"] = measure.interleaved(contestants, seconds * 8, seed=seed)
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
    record["inference_ms"] = measure.interleaved(inferences, seconds * 3, seed=seed)
    return record


def bars(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Ratios beside the bound each must keep."""
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
    title = f"Llama of {LAYERS} layers, hidden {HIDDEN}, {HEADS} heads, batch {BATCH} x {TOKENS}, fp32"
    return f"{title}\n{table(['', 'ms', '/ yardstick'], rows)}"
