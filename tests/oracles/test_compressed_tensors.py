"""transformers 5.17 with compressed-tensors 0.19 loads our modules exactly; its packer and ours agree bit for bit."""

import numpy as np
import pytest
import torch

from qsun.config import LayerSpec
from qsun.model.formats import pack_layer, unpack_layer
from qsun.model.quantized import Quantized
from tests.oracles.compare import difference, our_logits, record
from tests.oracles.conftest import Build, Probe

pytestmark = pytest.mark.oracle

TOLERANCE = 1e-5  # float32; the largest logits are about 20
MIXED = ("down_proj=bits:8", "o_proj=bits:3,group_size:64", r"layers\.0\.=skip")
CASES = {
    "2 sym g32": {"bits": 2},
    "2 asym g32": {"bits": 2, "sym": False},
    "3 sym g128": {"bits": 3, "group_size": 128},
    "3 asym g32": {"bits": 3, "sym": False},
    "4 sym g32": {},
    "4 sym g128 refined": {"group_size": 128, "method": "refined"},
    "4 sym one group": {"group_size": -1},
    "4 asym g32 awq": {"sym": False, "method": "awq"},
    "4 asym one group rtn": {"sym": False, "group_size": -1, "method": "rtn"},
    "8 sym g32": {"bits": 8},
    "8 asym g32": {"bits": 8, "sym": False},
    "mixed bits and a skipped block": {"overrides": MIXED},
    "mixed asym": {"sym": False, "overrides": MIXED},
    "4 sym lm_head": {"lm_head": True},
    "4 asym lm_head": {"lm_head": True, "sym": False},
}


@pytest.fixture(scope="module")
def theirs(build: Build, probe: Probe, tokens) -> dict[str, np.ndarray]:
    modules = [build("fp32", format="compressed-tensors", **settings) for settings in CASES.values()]
    return dict(zip(CASES, probe("ct", "transformers_logits.py", "float32", tokens, *modules), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_ours(build: Build, theirs, tokens, case):
    module = build("fp32", format="compressed-tensors", **CASES[case])
    measured = difference(theirs[case], our_logits(module, tokens, torch.float32))
    record("compressed-tensors", case=case, difference=measured)
    assert measured < TOLERANCE


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing_is_bit_exact_both_ways(probe: Probe, tmp_path, bits, sym):
    """Integers that we pack unpack there to the same, and the words are the same."""
    generator = torch.Generator().manual_seed(bits)
    q = torch.randint(0, 2**bits, (96, 160), generator=generator).to(torch.uint8)
    zeros = torch.randint(0, 2**bits, (5, 96), generator=generator).to(torch.uint8)
    spec = LayerSpec(bits, 32, sym)
    tensors = pack_layer(Quantized(q, torch.ones(5, 96), zeros), spec, "compressed-tensors")
    pairs = [(q, 1, tensors["weight_packed"])]
    if not sym:
        pairs.append((zeros.t(), 0, tensors["weight_zero_point"]))
    for number, (values, dim, packed) in enumerate(pairs):
        np.savez(tmp_path / f"{number}.npz", values=values.numpy(), packed=packed.numpy())
        their_packed = probe("ct", "compressed_pack.py", tmp_path / f"{number}.npz", bits, dim)
        assert np.array_equal(their_packed, packed.numpy())
        tensors[("weight_packed", "weight_zero_point")[number]] = torch.from_numpy(their_packed)
    again = unpack_layer(tensors, spec, "compressed-tensors")
    assert torch.equal(again.q, q)
    assert torch.equal(again.zeros, zeros if not sym else torch.full_like(zeros, 2 ** (bits - 1)))
