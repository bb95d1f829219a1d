"""Launch tables: what they choose fits the shape, and the workspace fits every choice."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qsun.kernels import launch_table
from qsun.kernels.launch_table import (
    KernelLaunch,
    candidates,
    choose_launch,
    load_launch_table,
    parse_launch_table,
    shape_key,
    workspace_bytes,
)
from qsun.kernels.layout import TILES, pack_weights

LLAMA_8B = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
QWEN_7B = [(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)]
SHAPES = [*LLAMA_8B, (2048, 2048), (16, 32), (176, 416), (128256, 4096), (64, 14336), (192, 1056)]


@pytest.mark.parametrize("bits", TILES)
@pytest.mark.parametrize("M", [1, 5, 8, 9, 16, 17, 32, 64, 65, 300, 512])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_a_choice_fits_the_shape(M, N, K, bits):
    for group_size in (32, -1):
        launch = choose_launch(M, N, K, group_size, "no such GPU", bits)
        tiles = math.ceil(K / TILES[bits].columns)
        assert math.ceil(N / 64) * 64 % launch.block_n == 0
        assert launch.block_m & (launch.block_m - 1) == 0
        assert launch.block_m >= 8
        assert (launch.split_k - 1) * math.ceil(tiles / launch.split_k) < tiles  # no split is empty
        assert launch.split_k == 1 or tiles * TILES[bits].columns / launch.split_k >= 384


@pytest.mark.parametrize("bits", TILES)
@pytest.mark.parametrize(("N", "K"), LLAMA_8B)
def test_the_processors_are_busy_at_batch_1(N, K, bits):
    launch = choose_launch(1, N, K, 128, "default", bits)
    programs = math.ceil(N / launch.block_n) * launch.split_k
    in_flight = programs / 132 * launch.block_n * 2 * TILES[bits].words * launch.tiles * (launch.stages - 1)
    assert 16 * 1024 <= in_flight <= 128 * 1024
    assert programs / 132 / math.ceil(programs / 132) > 0.8  # the last round is nearly full


@pytest.mark.parametrize(("layers", "most"), [(LLAMA_8B, 0.3), (QWEN_7B, 0.35)], ids=["llama", "qwen"])
def test_partial_sums_are_few_and_processors_even(layers, most):
    """A block's partial sums, written and read, over its weights of 4 bits; and what the busiest processor does."""
    for M in range(1, 129):
        moved = 0
        for N, K in layers:
            launch = choose_launch(M, N, K, 128, "default")
            passes = math.ceil(K / 128 / launch.tiles)
            tiles = math.ceil(N / launch.block_n) * math.ceil(M / launch.block_m)
            busiest = math.ceil(tiles * launch.split_k / 132) * math.ceil(passes / launch.split_k)
            assert tiles * passes / 132 >= 0.7 * busiest, (M, N, K)
            moved += 8 * M * N * launch.split_k if launch.split_k > 1 else 0
        assert moved <= most * sum(N * K / 2 for N, K in layers), M


@pytest.mark.parametrize("bits", TILES)
@pytest.mark.parametrize("M", [1, 40, 600])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_the_workspace_is_enough(M, N, K, bits):
    size, counters = workspace_bytes(M, N, K, -1, "default", bits)
    for m in {1, M // 2 + 1, M}:
        if m > load_launch_table("default").dequantize_above_m:
            assert size >= 2 * N * K
        else:
            launch = choose_launch(m, N, K, -1, "default", bits)
            assert size >= (4 * launch.split_k * m * N if launch.split_k > 1 else 0)
            assert counters >= math.ceil(N / launch.block_n) * math.ceil(m / launch.block_m)


def test_a_tuned_shape_is_taken_from_its_table(tmp_path, monkeypatch):
    table = json.loads((Path(launch_table.__file__).parent / "configs" / "default.json").read_text())
    best = {"block_n": 128, "block_m": 8, "split_k": 3, "warps": 2, "stages": 5, "fold": True}
    (tmp_path / "A-Tuned-GPU.json").write_text(
        json.dumps(table | {"shapes": {shape_key(6144, 4096, 128): {"4": best}}})
    )
    (tmp_path / "default.json").write_text(json.dumps(table))
    monkeypatch.setattr(launch_table, "_CONFIGS", tmp_path)
    load_launch_table.cache_clear()
    assert choose_launch(3, 6144, 4096, 128, "A Tuned GPU") == KernelLaunch(**best)
    for M, K, group_size, gpu in ((5, 4096, 128, "A Tuned GPU"), (3, 4096, 64, "A Tuned GPU"), (3, 4096, 128, "other")):
        assert choose_launch(M, 6144, K, group_size, gpu) != KernelLaunch(**best)
    load_launch_table.cache_clear()


def test_a_table_with_an_unknown_key_is_refused():
    table = json.loads((Path(launch_table.__file__).parent / "configs" / "default.json").read_text())
    table["buckets"]["4"][0]["wraps"] = 2
    with pytest.raises(TypeError, match="wraps"):
        parse_launch_table(table)


def test_a_table_of_another_version_gives_way_to_the_default(tmp_path, monkeypatch, caplog):
    """Tables had one list of buckets, for 4 bits; they lie in the package, where an upgrade finds them."""
    table = json.loads((Path(launch_table.__file__).parent / "configs" / "default.json").read_text())
    (tmp_path / "default.json").write_text(json.dumps(table))
    (tmp_path / "Old.json").write_text(json.dumps(table | {"buckets": table["buckets"]["4"]}))
    (tmp_path / "Few.json").write_text(json.dumps(table | {"buckets": {"4": table["buckets"]["4"][-1:]}}))
    monkeypatch.setattr(launch_table, "_CONFIGS", tmp_path)
    load_launch_table.cache_clear()
    default = load_launch_table("none")
    assert not caplog.records
    assert load_launch_table("Old") == default
    assert "Old.json is not used (AttributeError" in caplog.text and "tune-kernels writes a new one" in caplog.text
    few = load_launch_table("Few")
    assert len(few.buckets[4]) == 1 and few.buckets[2] == default.buckets[2]
    load_launch_table.cache_clear()


def test_the_default_is_for_as_many_processors_as_the_gpu_has(monkeypatch):
    """Two devices with different names; other names, as of a table that is written elsewhere, keep the table's 132."""
    stand_ins = {
        "device_count": lambda: 2,
        "get_device_name": lambda device: ["Large", "Small"][device],
        "get_device_properties": lambda device: SimpleNamespace(multi_processor_count=[264, 66][device]),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    load_launch_table.cache_clear()
    found = {name: load_launch_table(name).processors for name in ("Small", "Large", "elsewhere")}
    assert found == {"Small": 66, "Large": 264, "elsewhere": 132}
    splits = [choose_launch(1, 4096, 14336, 128, name).split_k for name in ("Small", "elsewhere", "Large")]
    assert splits == sorted(splits) and splits[0] < splits[-1]
    load_launch_table.cache_clear()
    choose_launch.cache_clear()


def test_candidates_are_many_and_distinct():
    for M, N, K in ((1, 6144, 4096), (64, 28672, 4096), (9, 80, 416)):
        found = list(candidates(M, N, K, 32))
        assert len(found) == len(set(found)) > 20
        assert all(math.ceil(N / 64) * 64 % launch.block_n == 0 for launch in found)


@pytest.mark.parametrize("bits", TILES)
def test_what_is_fetched_ahead_is_what_a_launch_says(bits):
    N, K = 512, 1024
    packed = pack_weights(
        torch.zeros(N, K, dtype=torch.uint8), torch.ones(1, N), torch.zeros(1, N), -1, torch.bfloat16, bits
    )
    tile_bytes = packed.words[0, 0].numel() * 2
    for block_n in (64, 128, 256):
        for kib in (0, 16, 64):
            launch = KernelLaunch(block_n, 8, 1, 2, 3, True, prefetch_kib=kib)
            fetched = launch.ahead(bits) * tile_bytes * block_n // 64
            assert fetched <= 1024 * kib < fetched + tile_bytes * block_n // 64
    tried = {(launch.block_n, launch.ahead(bits), launch.prefetch_kib) for launch in candidates(8, N, K, 128, bits)}
    assert len({(block_n, ahead) for block_n, ahead, _ in tried}) == len(tried)  # none twice
