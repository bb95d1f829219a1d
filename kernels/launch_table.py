"""Launch parameters of the product kernels: read from tables, never searched for while a model runs.

``configs/<GPU name>.json`` holds what was timed on that GPU, ``configs/default.json`` computed launches for all others.
A table has ``buckets`` for 2, 3, 4 and 8 bits: launches for M up to ``max_m`` and, where given, groups up to
``max_group``. The first bucket that matches applies, and a rule adds split K, for as many processors as the GPU has. It
may have ``shapes``, keyed ``"<N>x<K>w<bits>g<group>"`` and then by the ``max_m`` of a bucket, with complete launches.
With ``"dependent_launch": false`` no kernel of a decode step starts before the one in front of it has ended.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import torch

from qsun.kernels.layout import ROWS, TILES, Tile, ceil_div, padded_rows, tile_group

log = logging.getLogger(__name__)
_CONFIGS = Path(__file__).parent / "configs"
_FEWEST_COLUMNS = 512  # in a split: with fewer, filling the pipeline costs as much as the work
_OVERHEAD_BYTES = 128  # a row: what starting and finishing a program costs, as bytes of weights
_BUSY_WARPS = 6  # of a processor, so that its four schedulers have one to issue from
_PARTIALS = 4  # what a byte of partial sums costs, in bytes of weights: it is written, waited for and read (an H200)
_ANY_GROUP = 1 << 30


@dataclass(frozen=True)
class KernelLaunch:
    """The launch parameters of one product.

    block_n: weight rows a program; block_m: rows of x a program; split_k: programs that share the columns;
    fold: take zero points off the accumulator instead of off every weight (matmul_triton.packed_matmul);
    tiles: in a pass of its loop; prefetch_kib: of its weights, brought into L2 while the kernels before it still run.
    """

    block_n: int
    block_m: int
    split_k: int
    warps: int
    stages: int
    fold: bool
    tiles: int = 1
    prefetch_kib: int = 0

    def ahead(self, bits: int) -> int:
        """Return the tiles of each 64 rows that a program brings into L2."""
        return 1024 * self.prefetch_kib // (2 * TILES[bits].words * self.block_n)


@dataclass(frozen=True)
class Bucket:
    """The launch for M up to max_m and groups up to max_group, except for split_k."""

    max_m: int
    max_group: int
    launch: KernelLaunch


@dataclass(frozen=True)
class LaunchTable:
    """A GPU's launch parameters.

    processors: of the GPU; the default table's, where there is no GPU of the name either.
    dequantize_above_m: for larger M the matrix is dequantized and cuBLAS multiplies.
    dependent_launch: kernels of a decode step start while the one before them ends, where the GPU can.
    buckets: by the bits of a weight.
    """

    processors: int
    bytes_in_flight: int
    dequantize_above_m: int
    buckets: dict[int, tuple[Bucket, ...]]
    shapes: dict[str, dict[int, KernelLaunch]]
    dependent_launch: bool = True


@lru_cache(maxsize=1 << 14)
def choose_launch(M: int, N: int, K: int, group_size: int, gpu: str, bits: int = 4) -> KernelLaunch:
    """Return the launch for x (M, K) and weights (N, K) on the named GPU, always the same for the same arguments."""
    table = load_launch_table(gpu)
    group = tile_group(group_size, K) or K
    buckets = table.buckets[bits]
    bucket = next((b for b in buckets if b.max_m >= M and group <= b.max_group), buckets[-1])
    tuned = table.shapes.get(shape_key(N, K, group_size, bits), {}).get(bucket.max_m)
    if tuned is not None:
        return tuned
    return _split(M, N, K, bucket.launch, table, TILES[bits])


def dequantize_above_m(gpu: str) -> int:
    """Return the largest M of the fused kernel on the named GPU."""
    return load_launch_table(gpu).dequantize_above_m


def shape_key(N: int, K: int, group_size: int, bits: int = 4) -> str:
    """Return the key of a table's "shapes"."""
    return f"{N}x{K}w{bits}g{tile_group(group_size, K) or -1}"


def _split(M: int, N: int, K: int, launch: KernelLaunch, table: LaunchTable, tile: Tile) -> KernelLaunch:
    """Return the cheapest launch over all split_k, with fewer rows a program where that keeps the processors busier."""
    launches = []
    while launch.block_n >= ROWS:
        if padded_rows(N) % launch.block_n == 0:
            launches += [replace(launch, split_k=s) for s in _splits(K, launch.tiles * tile.columns)]
        fewest = 2 if launch.block_m < 32 else 4
        launch = replace(launch, block_n=launch.block_n // 2, warps=max(fewest, launch.warps // 2))
    return min(launches, key=lambda each: _cost(M, N, K, each, table, tile))


def _splits(K: int, columns: int) -> list[int]:
    """Return the values of split_k that leave every split at least 512 columns, or else one split.

    columns: of a pass, which splits share out whole.
    """
    passes = ceil_div(K, columns)
    most = max(1, passes * columns // _FEWEST_COLUMNS)
    return [s for s in range(1, most + 1) if ceil_div(passes, ceil_div(passes, s)) == s]


def _cost(M: int, N: int, K: int, launch: KernelLaunch, table: LaunchTable, tile: Tile) -> float:
    """Return the bytes that the busiest processor waits for; what comes from L2 counts half.

    Partial sums count four times, as nothing of their program overlaps them, and once more at half weight, as the last
    program of a tile reads all of them when most processors are done. What this chooses for the layers of
    Llama-3.1-8B at 1 to 64 rows took an H200 4% more time than the fastest launches (docs/results/gpu).
    """
    batch = min(M, launch.block_m)
    programs = ceil_div(N, launch.block_n) * launch.split_k * ceil_div(M, launch.block_m)
    weights, columns = launch.block_n * 2 * tile.words * launch.tiles, tile.columns * launch.tiles  # of a pass
    work = ceil_div(ceil_div(K, columns), launch.split_k) * (weights + batch * columns * 2 / 2)
    partials = 0 if launch.split_k == 1 else 4 * launch.block_n * batch
    in_flight = programs / table.processors * weights * (launch.stages - 1)
    warps = programs / table.processors * launch.warps
    starved = max(1.0, table.bytes_in_flight / in_flight, _BUSY_WARPS / warps)
    overhead = _OVERHEAD_BYTES * launch.block_n
    rounds = ceil_div(programs, table.processors)
    return rounds * (work + _PARTIALS * partials + overhead) * starved + (launch.split_k - 1) * partials / 2


def candidates(M: int, N: int, K: int, group_size: int, bits: int = 4) -> Iterator[KernelLaunch]:
    """Yield the launches worth timing for a shape on a GPU."""
    tile_group(group_size, K)
    tiles = ceil_div(K, TILES[bits].columns)
    splits = [s for s in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16) if s == 1 or tiles // s >= 2]
    smallest = next((b for b in (8, 16, 32, 64, 128) if b >= M), 128)
    for block_m in sorted({smallest, min(2 * smallest, 128), max(smallest // 2, 8)}):
        for block_n, warps in ((64, 2), (64, 4), (128, 2), (128, 4), (128, 8), (256, 4), (256, 8)):
            if padded_rows(N) % block_n or block_n * block_m > 64 * 64 * warps:
                continue  # more accumulators than registers
            folds = (True, False) if block_m <= 32 else (False,)
            for fold, stages, passed in product(folds, (2, 3, 4, 5, 6), (1, 2) if block_m <= 16 else (1,)):
                for split_k, ahead in product(splits, _prefetches(block_n, bits)):
                    yield KernelLaunch(block_n, block_m, split_k, warps, stages, fold, passed, ahead)


def _prefetches(block_n: int, bits: int) -> list[int]:
    """Return the values of prefetch_kib that make a difference: each brings another number of tiles."""
    tile_kib = 2 * TILES[bits].words * block_n / 1024
    return [kib for kib in (0, 8, 16, 32, 64) if not kib or kib >= tile_kib]


def workspace_bytes(M: int, N: int, K: int, group_size: int, gpu: str, bits: int = 4) -> tuple[int, int]:
    """Return (bytes, counters) that a Workspace needs for products of up to M rows."""
    limit = dequantize_above_m(gpu)
    dequantized = 2 * N * K if limit < M else 0
    needs = [
        product_workspace_bytes(m, N, choose_launch(m, N, K, group_size, gpu, bits))
        for m in range(1, min(M, limit) + 1)
    ]
    partials, counters = (max(sizes) for sizes in zip(*needs, strict=True))
    return max(dequantized, partials), counters


def product_workspace_bytes(M: int, N: int, launch: KernelLaunch) -> tuple[int, int]:
    """Return (bytes, counters) that one product needs."""
    splits = launch.split_k if launch.split_k > 1 else 0
    return 4 * splits * M * N, ceil_div(N, launch.block_n) * ceil_div(M, launch.block_m)


@lru_cache(maxsize=8)
def load_launch_table(gpu: str) -> LaunchTable:
    """Return the table of a GPU by its name in the driver, or the default table for as many processors as it has.

    Of bits that the GPU's table lacks, the default's launches apply; a table that cannot be read is warned of.
    """
    own = json_table(table_file(gpu))
    table = None if own is None else parse_launch_table(own)
    if table is not None and table.buckets.keys() >= TILES.keys():
        return table
    default = parse_launch_table(json.loads((_CONFIGS / "default.json").read_text()))
    if table is not None:
        return replace(table, buckets=default.buckets | table.buckets)
    return replace(default, processors=_processors(gpu) or default.processors)


def _processors(gpu: str) -> int:
    """Return how many processors the GPU of this name has, 0 where there is none here."""
    for device in range(torch.cuda.device_count()):
        if torch.cuda.get_device_name(device) == gpu:
            return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return 0


def json_table(file: Path) -> dict[str, Any] | None:
    """Return what a table's file holds; None if there is none, or if it is another version's, with a warning."""
    if not file.is_file():
        return None
    try:
        table: dict[str, Any] = json.loads(file.read_text())
        parse_launch_table(table)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        log.warning("launch table %s is not used (%s); qsun bench tune-kernels writes a new one", file, reason)
        return None
    return table


def table_file(gpu: str) -> Path:
    """Return the path of a GPU's table, which may not exist."""
    return _CONFIGS / f"{gpu.replace(' ', '-')}.json"


def parse_launch_table(data: dict[str, Any]) -> LaunchTable:
    """Parse a table's JSON; unknown or missing keys raise TypeError or KeyError."""
    return LaunchTable(
        processors=data["processors"],
        bytes_in_flight=data["bytes_in_flight"],
        dequantize_above_m=data["dequantize_above_m"],
        buckets={int(bits): tuple(_parse_bucket(**row) for row in rows) for bits, rows in data["buckets"].items()},
        shapes={
            key: {int(m): KernelLaunch(**launch) for m, launch in rows.items()}
            for key, rows in data.get("shapes", {}).items()
        },
        dependent_launch=data.get("dependent_launch", True),
    )


def _parse_bucket(max_m: int, max_group: int = _ANY_GROUP, **launch: Any) -> Bucket:
    return Bucket(max_m, max_group, KernelLaunch(split_k=1, **launch))
