"""CUDA graphs that share one pool of memory on each device: replays follow each other, and none reads another's."""

import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch

_pools: dict[torch.device, tuple[Any, "WeakSet[Any]"]] = {}
_locks: dict[torch.device, threading.Lock] = {}  # one capture at a time goes to a pool


def capture(device: torch.device, body: Callable[[], object]) -> Any:
    """Run `body` once, to allocate what a capture must not, and capture it. It must be right to run it twice.

    What body computes must go to memory from outside: the pool's is every other graph's too.
    """
    with _locks.setdefault(device, threading.Lock()):
        return _capture(device, body)


def _capture(device: torch.device, body: Callable[[], object]) -> Any:
    side = torch.cuda.Stream(device)  # of this device: without one, torch takes the one that it captured on first
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        body()
    torch.cuda.current_stream(device).wait_stream(side)
    graph, (pool, graphs) = torch.cuda.CUDAGraph(), _pool(device)
    kept = list(graphs)  # torch refuses a pool whose graphs are all gone
    # thread_local: what another thread does meanwhile, such as loading a module, is none of this capture's concern
    with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
        body()
    graphs.add(graph)
    del kept
    return graph


def _pool(device: torch.device) -> tuple[Any, "WeakSet[Any]"]:
    if device not in _pools or not _pools[device][1]:
        _pools[device] = torch.cuda.graph_pool_handle(), WeakSet()
    return _pools[device]
