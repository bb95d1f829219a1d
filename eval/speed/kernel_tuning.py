"""`qsun bench tune-kernels`: time launches of the product kernel on this GPU and write the table that it then reads.

All candidates would take hours to compile, so the search changes one setting at a time, starting from the launch in
use, until no change is faster. What it is about to time is compiled in several processes.
"""

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from qsun.errors import QsunError
from qsun.eval.speed.clock import interleaved
from qsun.eval.speed.kernel_bench import KernelVariant, check_bits, random_weights
from qsun.kernels import packed_cuda
from qsun.kernels.launch_table import (
    Bucket,
    KernelLaunch,
    candidates,
    choose_launch,
    json_table,
    load_launch_table,
    parse_launch_table,
    product_workspace_bytes,
    shape_key,
)
from qsun.kernels.layout import PackedWeights, pack_weights
from qsun.kernels.workspace import Workspace
from qsun.progress import Note

log = logging.getLogger(__name__)
Shapes = dict[str, dict[str, dict[str, Any]]]  # of a launch table
# Seconds of each launch that computes the right product.
Timer = Callable[[Sequence[KernelLaunch]], dict[KernelLaunch, float]]
_SETTINGS = (("split_k",), ("block_n", "warps"), ("stages", "tiles"), ("prefetch_kib",), ("fold",), ("block_m",))
_COPIES_BYTES = 256 << 20  # of packed weights, beyond any L2
_FEWEST = 4  # launches for which processes that compile are started
_GAIN = 0.99  # a launch replaces the best one if it takes less than this fraction of its time


def search(start: KernelLaunch, offered: Iterable[KernelLaunch], timer: Timer) -> tuple[KernelLaunch, float, float]:
    """Return the fastest launch reached from `start` by changing one setting at a time, its seconds, and `start`'s."""
    pool = list(dict.fromkeys([start, *offered]))
    times, tried = timer([start]), {start}
    if start not in times:
        raise QsunError(f"the launch in use, {start}, gives a wrong product on this GPU; please report this")
    best, first = start, times[start]
    improved = True
    while improved:
        improved = False
        for setting in _SETTINGS:
            same = {name: value for name, value in dataclasses.asdict(best).items() if name not in setting}
            near = [each for each in pool if each not in tried and same.items() <= dataclasses.asdict(each).items()]
            tried.update(near)  # those that fail or are wrong have no time
            times |= timer(near) if near else {}
            reached = min((launch for launch in [best, *near] if launch in times), key=times.__getitem__)
            if times[reached] < _GAIN * times[best]:
                best, improved = reached, True
    return best, times[best], first


def tune_kernels(
    layers: Sequence[tuple[str, str, int, int]],
    kind: KernelVariant,
    gpu: str,
    timer_for: Callable[[int, int, int, KernelVariant], Timer],
    note: Note = lambda _: None,
    save: Callable[[Shapes], None] = lambda _: None,
) -> Shapes:
    """Tune every layer shape for every bucket of M: the "shapes" of a launch table (kernels/launch_table.py).

    Args:
        timer_for: makes a timer for (M, N, K, kind); `gpu_timer` on a GPU.
        save: called with all launches so far whenever one is found.
    """
    check_bits(kind.bits)
    shapes: Shapes = {}
    for _model, _layer, N, K in layers:
        key = shape_key(N, K, kind.group_size, kind.bits)
        if key in shapes:
            continue
        shapes[key] = {}
        for bucket in _buckets(gpu, kind, K):
            M = bucket.max_m
            start = choose_launch(M, N, K, kind.group_size, gpu, kind.bits)
            timer = timer_for(M, N, K, kind)
            best, seconds, before = search(start, candidates(M, N, K, kind.group_size, kind.bits), timer)
            shapes[key][str(M)] = dataclasses.asdict(best)
            save(shapes)
            note(f"{key} M={M}: {1e6 * before:.1f} -> {1e6 * seconds:.1f} us, {best}")
    return shapes


def _buckets(gpu: str, kind: KernelVariant, K: int) -> list[Bucket]:
    """Return the buckets that apply to a grid: the first of each max_m that allows its group size."""
    size = K if kind.group_size == -1 else kind.group_size
    found: dict[int, Bucket] = {}
    for bucket in load_launch_table(gpu).buckets[kind.bits]:
        if size <= bucket.max_group:
            found.setdefault(bucket.max_m, bucket)
    return list(found.values())


def gpu_timer(
    M: int, N: int, K: int, kind: KernelVariant, compiling: Callable[[Sequence[KernelLaunch]], None] = lambda _: None
) -> Timer:
    """Time launches in CUDA graphs over copies of a matrix; those that fail or compute a wrong result are left out.

    In front of each product is a norm, as in a decode step, for which products wait and meanwhile fetch their weights.

    Args:
        compiling: called with launches before they are timed.
    Raises:
        QsunError: the kernels do not run on this device.
    """
    if not packed_cuda.available(kind.device):
        raise QsunError(f"{kind.device} does not run the kernels that would be tuned; the warning above says why")
    from qsun.kernels import decode_cuda, packed_triton

    weights = random_weights(N, K, kind)
    packed = pack_weights(*weights[:3], kind.group_size, kind.dtype, kind.bits)
    count = max(2, _COPIES_BYTES // (N * K * kind.bits // 8))
    copies = [PackedWeights(*(None if t is None else t.clone() for t in packed)) for _ in range(count)]  # type: ignore[arg-type]
    x = torch.randn(M, K, device=kind.device).to(kind.dtype)
    norm = partial(decode_cuda.rms_norm, x, torch.ones_like(x[0]), 1e-5)
    call = packed_triton.packed_product
    wanted = norm().float() @ weights.dequantize().t()

    def product(launch: KernelLaunch, held: PackedWeights, space: Workspace) -> torch.Tensor:
        return call(norm(), *held, N, kind.group_size, kind.bits, workspace=space, launch=launch)

    def timer(launches: Sequence[KernelLaunch]) -> dict[KernelLaunch, float]:
        compiling(launches)
        needs = [product_workspace_bytes(M, N, launch) for launch in launches]
        buffer_bytes, counters = (max(sizes) for sizes in zip(*needs, strict=True))
        space = Workspace.allocate(buffer_bytes, counters, kind.device)

        def right(launch: KernelLaunch) -> bool:
            space.counters.zero_()  # a wrong launch before this one may have left some
            try:
                y = product(launch, packed, space)
            except unusable_launches():
                return False
            return bool((y.float() - wanted).norm() < 0.02 * wanted.norm())

        names = {str(launch): launch for launch in launches if right(launch)}
        calls = {
            name: [lambda launch=launch, held=held: product(launch, held, space) for held in copies]
            for name, launch in names.items()
        }
        medians = interleaved(calls, kind.device, rounds=9) if calls else {}
        return {names[name]: seconds for name, seconds in medians.items()}

    return timer


def parallel_timer(M: int, N: int, K: int, kind: KernelVariant) -> Timer:
    """Return `gpu_timer`, whose launches are compiled side by side into Triton's cache first."""

    def compiling(launches: Sequence[KernelLaunch]) -> None:
        if len(launches) >= _FEWEST:
            compile_ahead(N, K, kind, launches)

    return gpu_timer(M, N, K, kind, compiling)


def compile_ahead(N: int, K: int, kind: KernelVariant, launches: Sequence[KernelLaunch]) -> None:
    """Compile launches side by side; what no process could compile is compiled when it is timed."""
    job = partial(_compiled, N, K, kind.group_size, kind.bits, str(kind.dtype).removeprefix("torch."), kind.sym)
    try:
        list(_compilers().map(job, launches))
    except BrokenProcessPool as error:
        _compilers.cache_clear()
        log.warning("launches are compiled one after another this time: %s", error)


@lru_cache(maxsize=1)
def _compilers() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(max(1, min(16, (os.cpu_count() or 1) - 1)), get_context("spawn"))


def _compiled(N: int, K: int, group_size: int, bits: int, dtype: str, sym: bool, launch: KernelLaunch) -> None:
    from qsun.kernels.packed_triton import compile_product

    with contextlib.suppress(*unusable_launches()):  # timing them says so
        compile_product(N, K, group_size, bits, getattr(torch, dtype), not sym, launch)


def unusable_launches() -> tuple[type[Exception], ...]:
    """Return what a launch raises that needs too many registers or too much shared memory, or does not compile."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    plain = (OutOfResources, PTXASError, CompilationError)  # subclasses of Exception alone
    return (*plain, RuntimeError, ValueError)


def write_table(shapes: Shapes, gpu: str, path: Path) -> None:
    """Add tuned launches to the table at `path`, or to the one in use where there is no file; others stay."""
    table = json_table(path) or _as_json(gpu)
    held = table.setdefault("shapes", {})
    for key, launches in shapes.items():
        held[key] = held.get(key, {}) | launches
    parse_launch_table(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(table, indent=1) + "\n")
    unfinished.replace(path)


def _as_json(gpu: str) -> dict[str, Any]:
    table = load_launch_table(gpu)
    buckets: dict[str, list[dict[str, Any]]] = {}
    for bits, held in table.buckets.items():
        rows = [{"max_m": b.max_m, "max_group": b.max_group, **dataclasses.asdict(b.launch)} for b in held]
        for row in rows:
            row.pop("split_k")
        buckets[str(bits)] = rows
    return {
        "processors": table.processors,
        "bytes_in_flight": table.bytes_in_flight,
        "dequantize_above_m": table.dequantize_above_m,
        "dependent_launch": table.dependent_launch,
        "buckets": buckets,
        "shapes": {
            key: {str(max_m): dataclasses.asdict(launch) for max_m, launch in rows.items()}
            for key, rows in table.shapes.items()
        },
    }
