"""Comparable timing: contenders take turns, calls rotate over copies larger than the caches, medians are kept."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch


def interleaved(
    contenders: Mapping[str, Sequence[Callable[[], object]]],
    device: torch.device,
    rounds: int,
    seconds: float = float("inf"),
) -> dict[str, float]:
    """Return the median seconds of one call of each contender.

    Args:
        contenders: name -> calls on different copies of the same data, which together exceed the last cache.
        rounds: turns of each contender; on a CPU one call a turn, on a GPU a replay of all calls in one CUDA graph.
        seconds: stop early after this long, with at least three turns each.
    """
    for calls in contenders.values():
        for call in calls:  # the first call may compile, or make a dequantized copy: not timed
            call()
    turns = {name: _graph(calls) if device.type == "cuda" else _in_turn(calls) for name, calls in contenders.items()}
    for turn in turns.values():
        turn()
    taken: dict[str, list[float]] = {name: [] for name in turns}
    started = time.perf_counter()
    for done in range(rounds):
        for name, turn in turns.items():
            taken[name].append(turn())
        if done >= 2 and time.perf_counter() - started > seconds:
            break
    return {name: statistics.median(times) for name, times in taken.items()}


def _in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
    position = 0

    def turn() -> float:
        nonlocal position
        call = calls[position % len(calls)]
        position += 1
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    return turn


def _graph(calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
    """Capture all calls in one graph, so that Python's launch overhead is not timed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()  # compile and warm up outside the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def turn() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / len(calls)

    return turn


def copy_bandwidth(device: torch.device, size_bytes: int) -> float:
    """Return the bytes a second read and written by copying one buffer to another, the median of several copies."""
    source = torch.ones(size_bytes // 8, dtype=torch.float64, device=device)
    target = torch.empty_like(source)
    calls = [lambda: target.copy_(source)]
    return 2 * source.numel() * 8 / interleaved({"copy": calls}, device, rounds=9)["copy"]
