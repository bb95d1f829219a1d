"""Comparable timing: contenders take turns, calls rotate over copies larger than the caches, medians are kept."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

_TURN_SECONDS, _MOST_REPLAYS = 0.002, 50  # of a graph in one turn: the gap before its first kernel is then noise


def interleaved(
    contenders: Mapping[str, Sequence[Callable[[], object]]],
    device: torch.device,
    rounds: int,
    seconds: float = float("inf"),
) -> dict[str, float]:
    """Return the median seconds of one call of each contender.

    Args:
        contenders: name -> calls on different copies of the same data, which together exceed the last cache.
        rounds: turns of each contender; on a CPU one call a turn, on a GPU several replays of one graph of all calls.
        seconds: stop early after this long, with at least three turns each.
    """
    for calls in contenders.values():
        for call in calls:  # the first call may compile, or make a dequantized copy: not timed
            call()
    turns = {
        name: _graph(calls, device) if device.type == "cuda" else _in_turn(calls) for name, calls in contenders.items()
    }
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


def _graph(calls: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], float]:
    """Capture all calls in one graph, so that Python's launch overhead is not timed."""
    with torch.cuda.device(device):
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls[:2]:
                call()  # compile and warm up outside the capture
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()

    def replays(count: int) -> float:
        with torch.cuda.device(device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(count):
                graph.replay()
            end.record()
            end.synchronize()
        return begin.elapsed_time(end) / 1000 / count

    count = max(2, min(_MOST_REPLAYS, math.ceil(_TURN_SECONDS / replays(1))))
    return lambda: replays(count) / len(calls)


def copy_bandwidth(device: torch.device, size_bytes: int) -> float:
    """Return the bytes a second read and written by copying one buffer to another, the median of several copies."""
    source = torch.ones(size_bytes // 8, dtype=torch.float64, device=device)
    target = torch.empty_like(source)
    calls = [lambda: target.copy_(source)]
    return 2 * source.numel() * 8 / interleaved({"copy": calls}, device, rounds=9)["copy"]
