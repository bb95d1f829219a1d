"""The machine code of the grouped low-rank kernels, without a GPU: no spills, wide loads, tensor cores."""

import pytest

pytest.importorskip("triton")

from qsun.kernels.lora_triton import expand_rows, row_tiles, shrink_rows
from tests.kernels.offline import compile_kernel

ADDRESSES = {"table_ptr": "*i64", "tiles_ptr": "*i64", "low_ptr": "*fp32", "table_stride": "i32"}
SHRINK = ADDRESSES | {"x_ptr": "*bf16", "M": "i32", "K": "i32!", "stride_x": "i32!", "share": "i32!"}
EXPAND = ADDRESSES | {"y_ptr": "*bf16", "M": "i32", "N": "i32!", "stride_y": "i32!", "splits": "i32"}


def check(code, widest_loads):
    assert not code.spills()
    assert code.shared_bytes <= 99 * 1024
    assert any(name.startswith(("HMMA", "HGMMA", "UTCHMMA")) for name in code.instructions)
    assert any(name.startswith(widest_loads) for name in code.instructions), code.instructions
    assert code.instructions["LDG.E"] <= 1  # only the rank


@pytest.mark.parametrize(
    ("rows", "rank"),
    [(1, 4), (600, 16), (600, 64), pytest.param(600, 256, marks=pytest.mark.slow)],
    ids=str,
)
def test_every_tile_compiles_well(rows, rank):
    tiles = row_tiles([(0, rows)], rank, "cpu")
    sizes = {"R": tiles.rank, "BM": tiles.block_m}
    shrink = compile_kernel(shrink_rows, SHRINK, sizes | {"BK": 64}, 90, 4)
    check(shrink, ("LDGSTS.E.BYPASS.128", "LDG.E.128"))
    assert shrink.in_loop("HMMA") + shrink.in_loop("HGMMA") > 0
    check(compile_kernel(expand_rows, EXPAND, sizes | {"BN": 64 if rank > 64 else 128}, 90, 4), ("LDG.E.128",))
