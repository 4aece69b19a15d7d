"""Management of JoLA adapters in a vLLM engine, instead of vLLM's manager of LoRA adapters. Requires vLLM."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.lora.layers import LoRAMappingType
from vllm.utils.torch_utils import direct_register_custom_op

from ...ops.head_edit.function import edit_rows
from ..jola.config import JolaConfig
from .jola_sites import JolaSites
from .pool import AdapterPool
from .selection import Current
from .slots import BASE_SLOT


class JolaManager:
    """Implements the interface of vLLM's `WorkerLoRAManager` with an `AdapterPool`. vLLM calls it from one thread.

    Args:
        vllm_config: the engine's; `max_cpu_loras` (default: `max_loras`) is the capacity.
        model: vLLM's model.
        device: the model's.
        fields: of the pool's `JolaConfig`.

    Raises:
        ValueError: a projection cannot be found or edited, or the model is distributed or multimodal.
    """

    def __init__(self, vllm_config: Any, model: nn.Module, device: torch.device, fields: dict[str, Any]) -> None:
        parallel = vllm_config.parallel_config
        if parallel.tensor_parallel_size > 1 or parallel.pipeline_parallel_size > 1:
            raise ValueError(
                "JoLA adapters need a whole model in each process, got tensor_parallel_size="
                f"{parallel.tensor_parallel_size} and pipeline_parallel_size={parallel.pipeline_parallel_size}; use data "
                "parallelism"
            )
        if vllm_config.model_config.is_multimodal_model:
            raise ValueError("JoLA adapters of multimodal models are not served; merge the adapter (save_merged)")
        if vllm_config.speculative_config is not None:
            raise ValueError("JoLA adapters are not served with speculative decoding; leave out speculative_config")
        lora = vllm_config.lora_config
        if lora.target_modules is not None:
            raise ValueError(
                f"JoLA adapters do not go by lora_config.target_modules, got {lora.target_modules}; give "
                "additional_config={'ctkernels': {'jola': {'target_modules': ...}}}"
            )
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._index = torch.zeros(tokens, dtype=torch.int64, device=device)
        self._staged = torch.zeros(tokens, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._pool = EnginePool(
            model,
            JolaConfig(**fields),
            lora.max_cpu_loras or lora.max_loras,
            vllm_config.model_config.model,
            self._index,
        )
        self._running: list[int] = []  # slots of the current batch
        self._dummies: set[int] = set()  # adapters of vLLM's warm-up, without edits

    # ---- adapters ----

    def add_adapter(self, request: Any) -> bool:
        """Loads an adapter; False if it is already loaded."""
        number = request.lora_int_id
        if number in self._dummies or (_name(number) in self._pool and not request.load_inplace):
            return False
        self._pool.load(_name(number), request.lora_path)
        return True

    def remove_adapter(self, number: int) -> bool:
        """Removes an adapter; False if there is none."""
        if _name(number) not in self._pool:
            return False
        self._pool.unpin(_name(number))
        self._pool.evict(_name(number))
        return True

    def pin_adapter(self, number: int) -> bool:
        """Pins an adapter."""
        self._pool.pin(_name(number))
        return True

    def list_adapters(self) -> set[int]:
        """The numbers of the adapters."""
        return {int(name.removeprefix(_PREFIX)) for name in self._pool.names} | self._dummies

    def remove_all_adapters(self) -> None:
        """Removes all adapters."""
        for number in self.list_adapters():
            self.remove_adapter(number)
        self._dummies.clear()

    # ---- a batch ----

    def set_active_adapters(self, requests: set[Any], mapping: Any) -> None:
        """Loads the adapters of a batch, and writes the slots of its tokens to the index that the edits read."""
        if mapping is not None and mapping.type is not LoRAMappingType.LANGUAGE:
            raise ValueError(f"expected adapters of a language model, got a mapping of {mapping.type}")
        loaded = [request for request in requests if _name(request.lora_int_id) in self._pool]
        slots = dict.fromkeys(self._dummies, BASE_SLOT)
        try:
            for request in sorted(requests, key=lambda request: request not in loaded):  # before loading evicts them
                if request.lora_int_id not in self._dummies:
                    self.add_adapter(request)
                    slots[request.lora_int_id] = self._pool.acquire(_name(request.lora_int_id))
        finally:
            before, self._running = self._running, [slot for slot in slots.values() if slot != BASE_SLOT]
            for slot in before:
                self._pool.release(slot)
        if mapping is not None:
            self._write(np.asarray(mapping.index_mapping, dtype=np.int64), slots)

    def _write(self, numbers: np.ndarray, slots: dict[int, int]) -> None:
        if not numbers.size:
            return
        distinct, inverse = np.unique(numbers, return_inverse=True)
        rows = np.array([slots[int(number)] if number > 0 else BASE_SLOT for number in distinct])
        count = len(numbers)
        self._staged[:count] = torch.from_numpy(rows[inverse.reshape(-1)])
        self._index[:count].copy_(self._staged[:count], non_blocking=True)

    # ---- vLLM's warm-up, with dummy adapters ----

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        """Does nothing: dummies need no cache."""
        yield

    def add_dummy_lora(self, request: Any, rank: int) -> bool:
        """Registers an adapter without edits."""
        self._dummies.add(request.lora_int_id)
        return True

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        """Returns vLLM's default: edits have no rank."""
        return default_rank

    def supports_tower_connector_lora(self) -> bool:
        """Returns False: only language models are served."""
        return False


_PREFIX = "adapter-"


def _name(number: int) -> str:
    return f"{_PREFIX}{number}"


class EnginePool(AdapterPool):
    """A pool whose sites read the tokens' slots from `index`, also in vLLM's compiled graphs."""

    def __init__(self, model: nn.Module, config: JolaConfig, capacity: int, base: str, index: Tensor) -> None:
        self._index = index
        super().__init__(model, config, capacity, base=base)

    def _make_sites(self, config: Any) -> EngineSites:
        return EngineSites(self.model, config, self._index)


class EngineSites(JolaSites):
    """Edits with a custom op that looks up its tables by name, as vLLM's compiled graphs look up their caches."""

    def __init__(self, model: nn.Module, config: JolaConfig, index: Tensor) -> None:
        if config.site != "head":
            raise ValueError(
                f"site: vLLM serves adapters with site='head', got site={config.site!r}; merge it (save_merged, of an MLP)"
            )
        super().__init__(model, config)
        self._index = index

    def attach(self, tables: dict[str, Tensor], current: Current) -> None:
        """Attaches the edits to the model."""
        self._engine = next(_engines)
        for name in self.heads:
            key = f"{self._engine}.{name}"
            _TABLES[key] = tables.get(f"{name}.m"), tables.get(f"{name}.a"), self._index
            self._handles.append(self._model.get_submodule(name).register_forward_pre_hook(_Hook(key)))

    def detach(self) -> None:
        """Detaches the edits."""
        super().detach()
        for name in self.heads:
            del _TABLES[f"{self._engine}.{name}"]


class _Hook:
    def __init__(self, key: str) -> None:
        self.key = key

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (torch.ops.vllm.ctkernels_jola_edit(args[0], self.key), *args[1:])


_engines = itertools.count()
_TABLES: dict[str, tuple[Tensor | None, Tensor | None, Tensor]] = {}


def _jola_edit(z: torch.Tensor, site: str) -> torch.Tensor:
    m, a, index = _TABLES[site]
    return edit_rows(z, m, a, index[: z.shape[0]])


def _jola_edit_fake(z: torch.Tensor, site: str) -> torch.Tensor:
    return torch.empty_like(z)


direct_register_custom_op("ctkernels_jola_edit", _jola_edit, fake_impl=_jola_edit_fake)
