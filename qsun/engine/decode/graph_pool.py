"""CUDA graphs that share one pool of memory on each device: replays follow each other, and none reads another's."""

import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch

_pools: dict[torch.device, tuple[Any, "WeakSet[Any]"]] = {}
_sides: dict[torch.device, Any] = {}  # the stream of all captures on a device, as graphs of one pool need the same
_lock = threading.Lock()  # torch allows one capture at a time in a process


def capture(device: torch.device, body: Callable[[], object]) -> Any:
    """Run `body` once, to allocate what a capture must not, and capture it. It must be right to run it twice.

    What body computes must go to memory from outside: the pool's is every other graph's too.
    """
    with _lock:
        return _capture(device, body)


def _capture(device: torch.device, body: Callable[[], object]) -> Any:
    if device not in _sides:
        _sides[device] = torch.cuda.Stream(device)  # without a device, it would belong to the current one
    side = _sides[device]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        body()
    torch.cuda.current_stream(device).wait_stream(side)
    graph, (pool, graphs) = torch.cuda.CUDAGraph(), _pool(device)
    kept = list(graphs)  # torch refuses a pool whose graphs are all gone
    _clear_cublas_workspaces()
    try:
        # thread_local: what another thread does meanwhile, such as loading a module, is none of this capture's concern
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            body()
    finally:
        _clear_cublas_workspaces()
    graphs.add(graph)
    del kept
    return graph


def _pool(device: torch.device) -> tuple[Any, "WeakSet[Any]"]:
    if device not in _pools or not _pools[device][1]:
        _pools[device] = torch.cuda.graph_pool_handle(), WeakSet()
    return _pools[device]


def _clear_cublas_workspaces() -> None:
    """Free cuBLAS's workspaces, so that products in a capture allocate theirs in the pool, which lives as long as they.

    A graph keeps the address of its workspace only, and torch frees those of a stream when one of its graphs dies.
    Source: torch/_inductor/cudagraph_trees.py, clear_cublas_manager.
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)  # older versions and CPU builds lack it
    if clear is not None:
        clear()
