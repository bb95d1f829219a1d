"""Tuning of launches with an invented timer: what is searched, written and read back."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context

import pytest
import torch

from qsun.errors import QsunError
from qsun.eval.speed import kernel_tuning
from qsun.eval.speed.kernel_bench import KernelVariant
from qsun.eval.speed.kernel_tuning import search, tune_kernels, write_table
from qsun.kernels import launch_table
from qsun.kernels.launch_table import KernelLaunch, candidates, choose_launch, load_launch_table, parse_launch_table
from tests.places import ROOT

LAYERS = [("", "a", 512, 1024), ("", "again", 512, 1024), ("", "b", 64, 256)]


def seconds(launch):
    """A valley whose floor is split 4, 5 stages, 128 rows, folded."""
    distance = abs(launch.split_k - 4) + abs(launch.stages - 5) + abs(launch.block_n - 128) / 64 + (not launch.fold)
    return 1e-6 * (10 + distance)


def timer(launches):
    return {launch: seconds(launch) for launch in launches if launch.warps != 8}


def test_the_floor_of_a_valley_is_found():
    start = choose_launch(8, 512, 1024, 128, "default")
    best, taken, before = search(start, candidates(8, 512, 1024, 128), timer)
    assert (best.split_k, best.stages, best.block_n, best.fold) == (4, 5, 128, True)
    assert taken == seconds(best) < before == seconds(start)


def test_launches_that_are_wrong_are_never_chosen():
    start = choose_launch(8, 512, 1024, 128, "default")

    def only_slow(launches):
        return {launch: 1.0 if launch == start else 0.5 for launch in launches if launch.stages in (start.stages, 6)}

    best, _, _ = search(start, candidates(8, 512, 1024, 128), only_slow)
    assert best.stages in (start.stages, 6)
    with pytest.raises(QsunError, match="gives a wrong product"):
        search(start, [], lambda launches: {})


def test_no_launch_is_tried_twice():
    """Not one that fails either, which takes as long to compile."""
    start, tried = choose_launch(8, 512, 1024, 128, "default"), Counter()

    def counting(launches):
        tried.update(launches)
        return {launch: 10 + abs(launch.split_k - 4) for launch in launches if launch.warps != 8}

    search(start, candidates(8, 512, 1024, 128), counting)
    assert any(launch.warps == 8 for launch in tried)
    assert set(tried.values()) == {1}


def test_a_new_file_has_the_launches_in_use_as_well(tmp_path):
    """And a search that has found one launch of a shape leaves the shape's others."""
    path, shipped = tmp_path / "new.json", load_launch_table("NVIDIA H200")
    key, launches = next(iter(shipped.shapes.items()))
    first = KernelLaunch(64, 8, 2, 2, 3, True)
    changed = min(launches)
    write_table({key: {str(changed): dataclasses.asdict(first)}}, "NVIDIA H200", path)
    written = parse_launch_table(json.loads(path.read_text()))
    assert len(launches) > 1
    assert written == dataclasses.replace(shipped, shapes=shipped.shapes | {key: launches | {changed: first}})


def test_a_table_is_written_added_to_and_read(tmp_path, monkeypatch):
    kind = KernelVariant(128, True, torch.bfloat16)
    shapes = tune_kernels(LAYERS, kind, "Some GPU", lambda *_: timer)
    assert list(shapes) == ["512x1024w4g128", "64x256w4g128"]
    path = tmp_path / "Some-GPU.json"
    write_table(dict([shapes.popitem()]), "Some GPU", path)
    write_table(shapes, "Some GPU", path)
    table = parse_launch_table(json.loads(path.read_text()))
    assert set(table.shapes) == {"512x1024w4g128", "64x256w4g128"}
    assert table.buckets == launch_table.load_launch_table("default").buckets
    monkeypatch.setattr(launch_table, "_CONFIGS", tmp_path)
    launch_table.load_launch_table.cache_clear()
    choose_launch.cache_clear()
    try:
        chosen = choose_launch(8, 512, 1024, 128, "Some GPU")
        assert chosen == table.shapes["512x1024w4g128"][8]
        assert isinstance(chosen, KernelLaunch)
    finally:
        launch_table.load_launch_table.cache_clear()
        choose_launch.cache_clear()


def test_every_bucket_is_tuned_at_its_own_size():
    sizes = []
    tune_kernels(LAYERS[:1], KernelVariant(), "Some GPU", lambda M, N, K, kind: sizes.append(M) or timer)
    assert sizes == [4, 8, 16, 32, 64, 128, 512]


def test_launches_found_so_far_survive_a_failure(tmp_path):
    path = tmp_path / "table.json"

    def timer_for(M, N, K, kind):
        if M == 32:
            raise RuntimeError("the GPU is gone")
        return timer

    with pytest.raises(RuntimeError, match="gone"):
        tune_kernels(
            LAYERS, KernelVariant(), "Some GPU", timer_for, save=lambda shapes: write_table(shapes, "Some GPU", path)
        )
    table = parse_launch_table(json.loads(path.read_text()))
    assert list(table.shapes["512x1024w4g128"]) == [4, 8, 16]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_is_one_line(cli):
    answer = cli("bench", "tune-kernels")
    assert answer.code == 2
    assert "no CUDA device" in answer.err


AHEAD = """
import sys
import torch
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

driver.set_active(Driver())
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.get_device_name = lambda device=None: "NVIDIA H200"

from qsun.eval.speed.kernel_bench import KernelVariant, random_weights
from qsun.eval.speed.kernel_tuning import _compiled
from qsun.kernels import packed_triton
from qsun.kernels.launch_table import KernelLaunch
from qsun.kernels.layout import pack_weights

kernels = lambda: len(list(Path(sys.argv[1]).rglob("*.cubin")))
launch = KernelLaunch(64, 8, 2, 2, 3, True, 2)
_compiled(512, 1024, 128, 4, "bfloat16", True, launch)
_compiled(512, 1024, 128, 4, "bfloat16", True, KernelLaunch(48, 8, 2, 2, 3, True, 2))  # no power of two: not raised
assert kernels() == 1

class Compiles:  # in place of the launch
    def __getitem__(self, grid):
        return lambda *args, **options: real.warmup(*args, grid=grid, **options)

real, packed_triton.packed_matmul = packed_triton.packed_matmul, Compiles()
packed_triton._check = lambda *_: None
packed_triton.pdl_options = lambda _: {"PDL": True, "launch_pdl": True}
kind = KernelVariant()
packed = pack_weights(*random_weights(512, 1024, kind)[:3], 128, torch.bfloat16, 4)
x = torch.randn(5, 1024).bfloat16()
packed_triton.packed_product(x, *packed, 512, 128, 4, launch=launch)
assert kernels() == 1, "the product did not find what was compiled ahead"
packed_triton.packed_product(x, *packed, 512, 128, 4, launch=launch, bias=x[0, :512])
assert kernels() == 2
"""


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_tuning_goes_on_where_processes_that_compile_die(monkeypatch, caplog):
    pools = []

    @lru_cache
    def compilers():
        pools.append(ProcessPoolExecutor(2, get_context("fork")))
        return pools[-1]

    monkeypatch.setattr(kernel_tuning, "_compilers", compilers)
    monkeypatch.setattr(kernel_tuning, "_compiled", killed)
    launches = [KernelLaunch(64, 8, splits, 2, 3, True) for splits in range(1, 5)]
    for _ in range(2):
        kernel_tuning.compile_ahead(512, 1024, KernelVariant(), launches)
    assert len(pools) == 2
    assert caplog.text.count("launches are compiled one after another") == 2


@pytest.mark.slow
def test_what_is_compiled_ahead_is_what_a_product_launches(tmp_path):
    pytest.importorskip("triton")
    here = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", AHEAD, str(tmp_path)], env=here, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
