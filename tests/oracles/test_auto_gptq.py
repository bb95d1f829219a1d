"""auto-gptq 0.7.1, the archived reference of the format, loads our gptq modules and gives our logits in float32."""

import numpy as np
import pytest
import torch

from tests.oracles.bases import with_own_head
from tests.oracles.compare import difference, our_logits, record
from tests.oracles.conftest import Build, Probe, ProbeFailedError

pytestmark = pytest.mark.oracle

TOLERANCE = 1e-4  # float32; the largest logits are about 20
CASES = {
    "4 sym g128": {"group_size": 128},
    "4 sym g32 refined": {"method": "refined"},
    "4 sym one group": {"group_size": -1},
    "4 asym g128": {"sym": False, "group_size": 128},
    "4 asym one group rtn": {"sym": False, "group_size": -1, "method": "rtn"},
    "2 sym g32": {"bits": 2},
    "2 asym g32": {"bits": 2, "sym": False},
    "3 sym g128": {"bits": 3, "group_size": 128},
    "3 asym g32": {"bits": 3, "sym": False},
    "8 sym g128": {"bits": 8, "group_size": 128},
    "8 asym g32": {"bits": 8, "sym": False},
    "4 sym desc_act g32": {"desc_act": True},
    "3 asym desc_act g128": {"bits": 3, "sym": False, "desc_act": True, "group_size": 128},
    "2 asym desc_act g32": {"bits": 2, "sym": False, "desc_act": True},
}


@pytest.fixture(scope="module")
def theirs(build: Build, probe: Probe, tokens) -> dict[str, np.ndarray]:
    modules = [build("fp32", **settings) for settings in CASES.values()]
    return dict(zip(CASES, probe("agptq", "auto_gptq_logits.py", tokens, *modules), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_ours(build: Build, theirs, tokens, case):
    ours = our_logits(build("fp32", **CASES[case]), tokens, torch.float32)
    measured = difference(theirs[case], ours)
    record("auto-gptq", case=case, difference=measured, largest=float(np.abs(ours).max()))
    assert measured < TOLERANCE


def test_logits_of_the_demo_are_ours_where_its_head_is_stored(build: Build, probe: Probe, demo_tokens, tmp_path):
    """Where embeddings are tied, auto-gptq leaves the head as the memory happened to be, unless the file has it."""
    tied = build("demo", bits=3, sym=False)
    lost, theirs = probe("agptq", "auto_gptq_logits.py", demo_tokens, tied, with_own_head(tied, tmp_path / "own"))
    ours = our_logits(tied, demo_tokens, torch.float32)
    measured = difference(theirs, ours)
    record("auto-gptq", case="demo 3 asym g32", difference=measured)
    assert measured < TOLERANCE
    assert not np.allclose(lost, ours, atol=1.0)


REFUSED = {
    "mixed bits": {"overrides": ("down_proj=bits:8",)},
    "skipped block": {"overrides": (r"layers\.0\.=skip",)},
    "lm_head": {"lm_head": True},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_load(build: Build, probe: Probe, tokens, case):
    """It fails, or loads without a word and gives other logits: none of these may be called loadable."""
    module = build("fp32", **REFUSED[case])
    try:
        theirs = probe("agptq", "auto_gptq_logits.py", tokens, module)[0]
    except ProbeFailedError:
        return
    ours = our_logits(module, tokens, torch.float32)
    assert not np.allclose(theirs, ours, atol=1.0)
