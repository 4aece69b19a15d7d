"""Cases that run in two processes of one group (gloo), which are started once for all of them."""

from __future__ import annotations

import json
import os
import socket
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_in_two(run, names, folder, want):
    """``run(name, rank, folder, want)``, a function of a module, for every name. Returns the error texts by name, a rank
    each."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    mp.spawn(_worker, args=(port, str(folder), want, run, list(names)), nprocs=2)
    return [json.loads((folder / f"results{rank}.json").read_text()) for rank in range(2)]


def _worker(rank, port, folder, want, run, names):
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2"
    )
    dist.init_process_group("gloo", rank=rank, world_size=2)
    results = {}
    for name in names:
        try:
            run(name, rank, folder, want)
            results[name] = ""
        except BaseException:
            results[name] = traceback.format_exc()
    with open(os.path.join(folder, f"results{rank}.json"), "w") as file:
        json.dump(results, file)
    dist.destroy_process_group()
