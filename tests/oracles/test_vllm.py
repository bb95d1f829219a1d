"""A real vLLM engine on this machine's CPU loads our modules, and its greedy tokens are ours, in bfloat16.

Each of its tokens is compared with our choice after the same tokens, where our choice is clear; so one unclear step
does not end a comparison. A process with one engine takes about half a minute.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.oracles.bases import random_tokens, save_tokens
from tests.oracles.compare import disagreements, our_logits, record
from tests.oracles.conftest import Build, Probe, ProbeFailedError

pytestmark = pytest.mark.oracle

NEW_TOKENS = 24
AWQ = {"format": "awq", "sym": False}
COMPRESSED = {"format": "compressed-tensors"}
SKIP_BLOCK = {"overrides": (r"layers\.0\.=skip",)}
CASES = {
    "full precision": {"bits": 16},
    "gptq 4 sym g128": {"group_size": 128},
    "gptq 4 sym g32 refined": {"method": "refined"},
    "gptq other groups in down_proj": {"overrides": ("down_proj=group_size:128",)},
    "gptq skipped block": SKIP_BLOCK,
    "gptq lm_head": {"lm_head": True},
    "awq 4 asym g32": {**AWQ, "method": "awq"},
    "awq 4 one group": {**AWQ, "group_size": -1},
    "awq skipped block": {**AWQ, **SKIP_BLOCK},
    "compressed 4 sym g32": COMPRESSED,
    "compressed 4 asym g32": {**COMPRESSED, "sym": False},
    "compressed 4 one group": {**COMPRESSED, "group_size": -1},
    "compressed other groups in down_proj": {**COMPRESSED, "overrides": ("down_proj=group_size:128",)},
    "compressed skipped block": {**COMPRESSED, **SKIP_BLOCK},
}
REFUSED_ON_CPU = {
    "gptq 8 sym g128": {"bits": 8, "group_size": 128},
    "gptq mixed bits": {"overrides": ("down_proj=bits:8",)},
    "gptq 4 asym": {"sym": False},
    "compressed 8 sym g32": {**COMPRESSED, "bits": 8},
    "compressed 3 sym g32": {**COMPRESSED, "bits": 3},
    "compressed lm_head": {**COMPRESSED, "lm_head": True},
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokens(tmp_path_factory.mktemp("prompts") / "prompts.npy", random_tokens(6, 40, seed=9))


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_ours(build: Build, probe: Probe, prompts, case):
    module = build("bf16", **CASES[case])
    answers = probe("vllm", "vllm_tokens.py", module, prompts, NEW_TOKENS)
    chosen = answers[:, 0].astype(np.int64)
    fed = np.concatenate([np.load(prompts, allow_pickle=False), chosen[:, :-1]], axis=1)
    ours = our_logits(module, fed, torch.bfloat16)[:, -NEW_TOKENS:]
    wrong, clear = disagreements(chosen, ours)
    chances = torch.from_numpy(ours).log_softmax(-1).gather(-1, torch.from_numpy(chosen)[..., None])[..., 0].numpy()
    gap = float(np.abs(chances - answers[:, 1]).max())
    record("vllm", case=case, tokens=chosen.size, clear=clear, wrong=wrong, logprob_difference=gap)
    assert clear >= 30
    assert wrong == 0
    assert gap < 1.0


@pytest.mark.parametrize("case", REFUSED_ON_CPU)
def test_what_it_cannot_load(build: Build, probe: Probe, prompts, case):
    with pytest.raises(ProbeFailedError) as failure:
        probe("vllm", "vllm_tokens.py", build("bf16", **REFUSED_ON_CPU[case]), prompts, NEW_TOKENS)
    lines = [line for line in str(failure.value).splitlines() if "Error: " in line]
    record("vllm", case=case, error=lines[-1][-200:] if lines else "")
