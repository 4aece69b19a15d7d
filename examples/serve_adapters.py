"""One Llama, three JoLA adapters, and transformers' continuous batching: every request is answered with its own adapter.

    python examples/serve_adapters.py

A tiny random model stands in for a real one. Needs `pip install ctkernels[adapters]` with transformers >= 5.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from ctkernels.adapters import AdapterPool, JolaConfig, save_adapter


class AdapterBatching:
    """Gives every request of transformers' continuous batching its adapter.

    A request keeps the version of the adapter that it was added with. Blocks of the cache must not be shared between
    requests: transformers would share them by their tokens alone, and keys and values depend on the adapter.

    Args:
        pool: the model's pool.
        manager: what `model.init_continuous_batching` returns, with a configuration of `without_sharing`.

    Examples:
        >>> manager = model.init_continuous_batching(continuous_batching_config=without_sharing())  # doctest: +SKIP
        >>> batching = AdapterBatching(pool, manager)  # doctest: +SKIP
        >>> manager.start()  # doctest: +SKIP
        >>> batching.add("first", tokens, "law", max_new_tokens=16)  # doctest: +SKIP
    """

    def __init__(self, pool: AdapterPool, manager: Any) -> None:
        config = manager.continuous_batching_config
        if config.allow_block_sharing or config.use_async_batching or any(config.cuda_graph_booleans):
            raise ValueError(
                "manager: expected allow_block_sharing=False, use_async_batching=False and use_cuda_graph=False, got "
                f"{config.allow_block_sharing}, {config.use_async_batching}, {any(config.cuda_graph_booleans)}"
            )
        self.pool, self.manager = pool, manager
        self._slots: dict[str, int] = {}
        self._begun: set[str] = set()
        self._add, self._step, self._turn = manager.add_request, manager._generation_step, manager._generation_loop_body
        self._cancel = manager.cancel_request
        manager._generation_step, manager._generation_loop_body = self._served_step, self._freeing_turn
        manager.cancel_request = self._noted_cancel

    def add(self, request: str, tokens: list[int], adapter: str | None, **options: Any) -> None:
        """Queue a request; an adapter that is not in the pool is an error here."""
        self._slots[request] = self.pool.acquire(adapter)
        if self._add(tokens, request_id=request, **options) is None:
            self.pool.release(self._slots.pop(request))
            raise RuntimeError(f"{request}: the manager takes no requests")

    def _noted_cancel(self, request: str) -> None:
        """Cancel a request, which may not have begun."""
        if request in self._slots:
            self._begun.add(request)
        self._cancel(request)

    def _served_step(self) -> None:
        """One forward; its tokens lie in one row, request after request."""
        batch = self.manager.batch_processor.inputs_and_outputs.requests_in_batch
        slots = [self._slots[part.state.request_id] for part in batch for _ in range(part.query_length)]
        with self.pool.serve(torch.tensor(slots, device=self.manager.model.device), packed=True):
            self._step()

    def _freeing_turn(self, processor: Any, bootstrapping: bool) -> bool:
        """One turn of the generation thread; requests that have ended, or were cancelled, release their adapter."""
        goes_on = self._turn(processor, bootstrapping)
        there = {*processor.scheduler.active_requests, *processor.scheduler.waiting_requests}
        self._begun |= there & self._slots.keys()
        for request in self._begun - there:
            self._begun.remove(request)
            self.pool.release(self._slots.pop(request))
        return goes_on


def without_sharing(blocks: int = 64, tokens: int = 256) -> Any:
    """A configuration with a cache of `blocks` of 256 tokens, and at most `tokens` in one forward."""
    from transformers import ContinuousBatchingConfig

    return ContinuousBatchingConfig(
        num_blocks=blocks,
        max_batch_tokens=tokens,
        allow_block_sharing=False,
        use_async_batching=False,
        use_cuda_graph=False,
    )


def answers(manager: Any, count: int) -> dict[str, list[int]]:
    """The tokens of the next `count` requests that are done."""
    done: dict[str, list[int]] = {}
    while len(done) < count:
        result = manager.get_result(timeout=1)
        if result is None and not manager.is_running():
            raise RuntimeError("the generation thread has ended")
        if result is not None and result.is_finished():
            if result.error is not None:
                raise RuntimeError(f"{result.request_id}: {result.error}")
            done[result.request_id] = result.generated_tokens
    return done


def tiny_model() -> Any:
    """A random Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128, eos_token_id=None, pad_token_id=0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def tiny_adapters(folder: Path, names: list[str]) -> None:
    """Random adapters, each in a folder of its name."""
    import peft

    for number, name in enumerate(names):
        model = peft.get_peft_model(tiny_model(), JolaConfig(task_type="CAUSAL_LM"))
        torch.manual_seed(number + 1)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if ".jola_m." in key or ".jola_a." in key:
                    parameter.copy_(0.7 * torch.randn_like(parameter))
        save_adapter(model, folder / name)


def main() -> int:
    names = ["law", "medicine", "poetry"]
    with tempfile.TemporaryDirectory() as folder:
        tiny_adapters(Path(folder), names)
        model = tiny_model()
        pool = AdapterPool(model, JolaConfig(), capacity=100)
        for name in names:
            pool.load(name, Path(folder) / name)
    print(pool, f"{pool.bytes_per_adapter:,} bytes each")

    prompt = [5, 17, 42, 99]
    with pool.batch([*names, None]):
        tokens = model.generate(input_ids=torch.tensor([prompt] * 4), max_new_tokens=8, do_sample=False)
    for name, row in zip([*names, "base"], tokens[:, len(prompt) :].tolist()):
        print(f"generate    {name:10}{row}")

    manager = model.init_continuous_batching(continuous_batching_config=without_sharing())
    batching = AdapterBatching(pool, manager)
    manager.start()
    for name in [*names, None]:
        batching.add(name or "base", prompt, name, max_new_tokens=8)
    for name, answer in sorted(answers(manager, 4).items()):
        print(f"continuous  {name:10}{answer}")
    manager.stop(block=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
