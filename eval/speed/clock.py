"""Comparable timing: contenders take turns, calls rotate over copies larger than the caches, medians are kept."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from qsun.engine.decode.graph_pool import capture

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
    turn_of = _graph if device.type == "cuda" else _in_turn
    turns = {name: turn_of(calls, device) for name, calls in contenders.items()}
    return {name: statistics.median(times) for name, times in in_turns(turns, rounds, 1, seconds).items()}


def in_turns(
    turns: Mapping[str, Callable[[], float]],
    rounds: int,
    untimed: int,
    seconds: float = float("inf"),
    alternate: bool = False,
) -> dict[str, list[float]]:
    """Return what the turns of each contender return, which is how long they took.

    Args:
        untimed: turns of each before those that are kept: the first ones allocate or compile what the others reuse.
        seconds: stop early after this long, with at least three turns each. alternate: change the order every round.
    """
    taken: dict[str, list[float]] = {name: [] for name in turns}
    started = time.perf_counter()
    for number in range(untimed + rounds):
        for name in list(turns)[:: -1 if alternate and number % 2 == 0 else 1]:
            taken[name].append(turns[name]())
        if number - untimed >= 2 and time.perf_counter() - started > seconds:
            break
    return {name: times[untimed:] for name, times in taken.items()}


def seconds_of(call: Callable[[], object], device: torch.device, own: bool = False) -> float:
    """Return the seconds that a call takes, its work on a GPU included; own: on a CPU, this process's CPU seconds."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    now = time.process_time if own and device.type != "cuda" else time.perf_counter
    wait()
    started = now()
    call()
    wait()
    return now() - started


def _in_turn(calls: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], float]:
    following = itertools.cycle(calls)
    return lambda: seconds_of(next(following), device)


def _graph(calls: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], float]:
    """Capture all calls in one graph, so that Python's launch overhead is not timed."""

    def body() -> None:
        for call in calls:
            call()

    with torch.cuda.device(device):
        graph = capture(torch.device("cuda", torch.cuda.current_device()), body)

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
    """Return the bytes a second that a kernel reads from one buffer and writes to another, the median of several times.

    On a GPU a copy in a graph would be the copy engine's, which is slower than kernels are (2.8 TB/s on an H200, where
    they reach 4.2).
    """
    source = torch.ones(size_bytes // 8, dtype=torch.float64, device=device)
    target = torch.empty_like(source)
    calls = [lambda: torch.neg(source, out=target) if device.type == "cuda" else target.copy_(source)]
    return 2 * source.numel() * 8 / interleaved({"copy": calls}, device, rounds=9)["copy"]
