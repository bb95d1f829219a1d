"""Tuning of launches with an invented timer: what is searched, written and read back."""

import json

import pytest
import torch

from qsun.errors import QsunError
from qsun.eval.speed.kernel_bench import KernelVariant
from qsun.eval.speed.kernel_tuning import search, tune_kernels, write_table
from qsun.kernels import launch_table
from qsun.kernels.launch_table import KernelLaunch, candidates, choose_launch, parse_launch_table

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
