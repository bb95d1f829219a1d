"""The grouped low-rank products in Triton's interpreter against float64. Run by test_interpreter.py."""

import pytest
import torch

from qsun.kernels.lora_triton import MOST_RANK, add_lora_rows, row_tiles, table_entry
from tests.kernels.lora_oracle import Draw, check

pytest_plugins = "tests.kernels.interpreter"

HALF, SINGLE = torch.float16, torch.float32


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
@pytest.mark.parametrize("rank", [1, 4, 8, 15, 16, 17, 32, 64])
def test_ranks(rank, dtype):
    check(Draw([rank, rank], [19, 33], 80, 96, dtype, seed=rank))


@pytest.mark.parametrize("rank", [65, 200, MOST_RANK])
def test_large_ranks(rank):
    check(Draw([rank, 4], [40, 3], 48, 64, HALF, seed=rank))


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
@pytest.mark.parametrize(
    ("lengths", "N", "K"),
    [
        ([1], 16, 16),  # one row
        ([1, 1, 1, 1], 129, 65),  # odd tails of every size
        ([0, 5, 0], 40, 72),  # segments without rows
        ([0, 0], 16, 16),  # and none with any
        ([16, 17, 15], 128, 64),
        ([64, 65, 63], 130, 70),
        ([100, 1, 31], 24, 1100),  # columns shared by two programs
        ([7], 17, 2050),  # and by four, of which the last has few
    ],
    ids=str,
)
def test_shapes(lengths, N, K, dtype):
    check(Draw([4, 16, 7, 33][: len(lengths)], lengths, N, K, dtype, gap=8, first=3, seed=N + K))


def test_adapters_that_lack_the_layer():
    check(Draw([0, 8, 0], [5, 6, 7], 48, 64, HALF))
    check(Draw([0, 0], [5, 6], 48, 64, HALF))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_an_infinite_row_stays_in_its_row():
    case = Draw([8, 3], [4, 20], 32, 64, SINGLE)
    case.x[2, 5] = float("inf")
    found = case.run()
    fine = [i for i in range(24) if i != 2]
    assert found[fine].isfinite().all()
    assert not found[2].isfinite().any()


def test_one_adapter_in_several_segments():
    case = Draw([8, 5, 8], [4, 20, 9], 32, 64, SINGLE)
    case.pairs[2] = case.pairs[0]
    a, b = (part.double() for part in case.pairs[0])
    case.exact[24:33] = case.y[24:33].double() + case.x[24:33].double() @ a.t() @ b
    check(case)


def test_what_does_not_fit():
    case = Draw([8], [4], 32, 64, HALF)
    (a, b), tiles = case.pairs[0], row_tiles(case.segments, 8, torch.device("cpu"))
    table = torch.tensor([table_entry(a, b)])
    for y, x, entries in (
        (case.y, case.x[:3], table),
        (case.y, case.x.float(), table),
        (case.y, case.x[:, ::2], table),
        (case.y[:, ::2], case.x, table),
        (case.y, case.x, table.int()),
        (case.y, case.x, table[:, :2]),
    ):
        with pytest.raises(ValueError, match="want"):
            add_lora_rows(y, x, entries, tiles)
    with pytest.raises(ValueError, match="rank 257 is above 256"):
        row_tiles([(0, 4)], 257, torch.device("cpu"))
    for bad in ((a, b[:7]), (a.t(), b), (a[1:], b[1:].t()), (a.view(-1)[1:9].view(8, 1), b)):
        with pytest.raises(ValueError, match="want"):
            table_entry(*bad)
