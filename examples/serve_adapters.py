"""One Llama, three JoLA adapters, and transformers' continuous batching: every request is answered with its own adapter.

    python examples/serve_adapters.py

A tiny random model stands in for a real one. Needs `pip install ctkernels[adapters]` with transformers >= 5.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ctkernels.adapters import AdapterPool, JolaConfig, save_adapter


class AdapterBatching:
    """Continuous batching of a model that has a pool: requests come and go, and so do adapters.

    A request keeps the version of the adapter that it was added with. Blocks of the cache are not shared between
    requests: transformers would share them by their tokens alone, and keys and values depend on the adapter.

    Args:
        pool: the model's pool.
        model: the model that transformers runs.
        blocks: of 256 tokens, in the cache of keys and values.
        tokens: at most so many in one forward.

    Example:
        >>> with AdapterBatching(pool, model).running() as batching:
        ...     batching.add("first", tokens, "law")
        ...     print(batching.result())
    """

    def __init__(self, pool: AdapterPool, model: Any, *, blocks: int = 64, tokens: int = 256) -> None:
        from transformers import ContinuousBatchingConfig

        self.pool = pool
        config = ContinuousBatchingConfig(
            num_blocks=blocks,
            max_batch_tokens=tokens,
            allow_block_sharing=False,
            use_async_batching=False,
            use_cuda_graph=False,
        )
        self.manager = model.init_continuous_batching(continuous_batching_config=config)
        self._slots: dict[str, int] = {}
        self._step = self.manager._generation_step
        self.manager._generation_step = self._step_with_adapters

    def _step_with_adapters(self) -> None:
        """One forward; its tokens lie in one row, request after request."""
        batch = self.manager.batch_processor.inputs_and_outputs.requests_in_batch
        slots = [self._slots[part.state.request_id] for part in batch for _ in range(part.query_length)]
        with self.pool.serve(torch.tensor(slots, device=self.manager.model.device), packed=True):
            self._step()

    @contextmanager
    def running(self) -> Iterator[AdapterBatching]:
        """Generate in a thread until the block ends."""
        self.manager.start()
        try:
            yield self
        finally:
            self.manager.stop(block=True)
            for slot in self._slots.values():
                self.pool.release(slot)
            self._slots.clear()

    def add(self, request: str, tokens: list[int], adapter: str | None, max_new_tokens: int = 16) -> None:
        """Queue a request; an adapter that is not in the pool is an error here."""
        self._slots[request] = self.pool.acquire(adapter)
        self.manager.add_request(tokens, request_id=request, max_new_tokens=max_new_tokens)

    def result(self) -> tuple[str, list[int]]:
        """Wait for the next request that is done: its name and its tokens."""
        while True:
            result = self.manager.get_result(timeout=1)
            if result is None and not self.manager.is_running():
                raise RuntimeError("the generation thread has ended")
            if result is not None and result.is_finished():
                self.pool.release(self._slots.pop(result.request_id))
                if result.error is not None:
                    raise RuntimeError(f"{result.request_id}: {result.error}")
                return result.request_id, result.generated_tokens


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

    with AdapterBatching(pool, model).running() as batching:
        for name in [*names, None]:
            batching.add(name or "base", prompt, name, max_new_tokens=8)
        for name, answer in sorted(batching.result() for _ in range(4)):
            print(f"continuous  {name:10}{answer}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
