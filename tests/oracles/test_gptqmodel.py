"""transformers 5.23 with optimum 2.3 and gptqmodel 7.6 loads our GPTQ and AWQ modules, and gives our logits and tokens.

Its 4-bit CPU kernel computes in bfloat16 even where the model is float32, so the bound is that precision's noise: our
own bfloat16 logits are 0.02 from our float32 ones (root mean square, relative).
"""

import numpy as np
import pytest
import torch

from tests.oracles.compare import difference, disagreements, our_logits, record, relative
from tests.oracles.conftest import Build, Probe, ProbeFailedError

pytestmark = pytest.mark.oracle

TOLERANCE = 0.04
AWQ = {"format": "awq", "sym": False}
CASES = {
    "gptq 4 sym g128": {"group_size": 128},
    "gptq 4 sym g32 refined": {"method": "refined"},
    "gptq 4 asym g32": {"sym": False},
    "gptq 4 sym desc_act g32": {"desc_act": True},
    "gptq 3 sym g32": {"bits": 3},
    "gptq 2 asym g32": {"bits": 2, "sym": False},
    "gptq 8 sym g128": {"bits": 8, "group_size": 128},
    "awq 4 asym g32": {**AWQ, "method": "awq"},
    "awq 4 asym g128": {**AWQ, "group_size": 128},
    "awq 4 sym g32": {**AWQ, "sym": True},
    "awq skipped block": {**AWQ, "overrides": (r"layers\.0\.=skip",)},
}
REFUSED = {
    "gptq mixed bits": {"overrides": ("down_proj=bits:8",)},
    "gptq skipped block": {"overrides": (r"layers\.0\.=skip",)},
    "gptq lm_head": {"lm_head": True},
    "gptq 4 one group, its CPU kernel": {"group_size": -1},
    "awq 4 one group, its CPU kernel": {**AWQ, "group_size": -1},
}


@pytest.fixture(scope="module")
def theirs(build: Build, probe: Probe, tokens) -> dict[str, np.ndarray]:
    modules = [build("bf16", **settings) for settings in CASES.values()]
    return dict(zip(CASES, probe("gptqm", "transformers_logits.py", "bfloat16", tokens, *modules), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_logits_and_tokens_are_ours(build: Build, theirs, tokens, case):
    ours = our_logits(build("bf16", **CASES[case]), tokens, torch.float32)
    noise = relative(theirs[case], ours)
    wrong, clear = disagreements(theirs[case].argmax(-1), ours)
    record("gptqmodel", case=case, relative=noise, difference=difference(theirs[case], ours), clear=clear, wrong=wrong)
    assert noise < TOLERANCE
    assert clear >= 50
    assert wrong == 0


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_load(build: Build, probe: Probe, tokens, case):
    """It fails, or (gptq lm_head) loads another head without a word: none of these may be called loadable."""
    module = build("bf16", **REFUSED[case])
    try:
        theirs = probe("gptqm", "transformers_logits.py", "bfloat16", tokens, module)[0]
    except ProbeFailedError:
        return
    noise = relative(theirs, our_logits(module, tokens, torch.float32))
    record("gptqmodel", case=case, relative=noise)
    assert noise > 0.5
