"""`transformers serve` with a pool: a request for "MODEL#law" is answered with the adapter "law", one for "MODEL" without.

    python examples/transformers_serve.py MODEL adapters/law adapters/medicine --port 8000

Each adapter is a folder, and its name the folder's. Needs `pip install ctkernels[adapters] transformers[serving]`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from ctkernels.adapters import AdapterPool, JolaConfig
from examples.serve_adapters import AdapterBatching, without_sharing

_ADAPTER: ContextVar[str | None] = ContextVar("adapter", default=None)  # of the request that a task answers


@contextmanager
def adapters_in_serve(folders: list[Path], capacity: int = 1000) -> Iterator[None]:
    """In this block, servers of transformers load these adapters with their model, and take their names in requests."""
    from fastapi import HTTPException
    from transformers.cli.serving.utils import BaseHandler, CBGenerateManager

    pools: dict[int, AdapterPool] = {}
    resolve, begin = BaseHandler._resolve_model, CBGenerateManager.init_cb

    def resolve_model(self: Any, body: dict[str, Any]) -> Any:
        """The model of a request, and its adapter noted for the same task."""
        body["model"], _, name = body["model"].partition("#")
        result = resolve(self, body)
        model = result[1]
        if id(model) not in pools:
            pools[id(model)] = AdapterPool(model, JolaConfig(), capacity)
            for folder in folders:
                pools[id(model)].load(folder.name, folder)
        if name and name not in pools[id(model)]:
            raise HTTPException(404, f"model: expected one of the adapters {pools[id(model)].names}, got {name!r}")
        _ADAPTER.set(name or None)
        return result

    def init_cb(self: Any, model: Any, gen_config: Any) -> None:
        """Start continuous batching, once, with an adapter for each request."""
        if self._cb is None:
            self._cb_config = without_sharing()
            begin(self, model, gen_config)
            batching = AdapterBatching(pools[id(model)], self._cb)

            def add_request(tokens: list[int], request_id: str, **options: Any) -> str:
                batching.add(request_id, tokens, _ADAPTER.get(), **options)
                return request_id

            self._cb.add_request = add_request

    BaseHandler._resolve_model, CBGenerateManager.init_cb = resolve_model, init_cb
    try:
        yield
    finally:
        BaseHandler._resolve_model, CBGenerateManager.init_cb = resolve, begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the base model, a name or a folder")
    parser.add_argument("adapters", type=Path, nargs="*", help="folders of JoLA adapters")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    from transformers.cli.serve import Serve

    with adapters_in_serve(args.adapters):
        Serve(args.model, continuous_batching=True, port=args.port)
    return 0


if __name__ == "__main__":
    sys.exit(main())
