"""A real vLLM engine on this machine's CPU with our plugin: every format and bit width, in float32, token by token.

One engine that reads its own prompts is compared with `qsun.generate` over the same module, which then reads them too:
int4 on both sides of the seam. What a cluster does is compared in tests/vllm.
"""

from pathlib import Path

import numpy as np
import pytest

import qsun
from tests.oracles.bases import random_tokens, save_tokens
from tests.oracles.conftest import Build, Probe, ProbeFailedError
from tests.tiny_models import build_model

pytestmark = pytest.mark.oracle

NEW_TOKENS = 24
AWQ = {"format": "awq", "sym": False}
COMPRESSED = {"format": "compressed-tensors"}
CASES = {
    "gptq 4 sym g128": {"group_size": 128},
    "gptq 4 asym g32": {"sym": False},
    "gptq 4 one group": {"group_size": -1},
    "gptq 4 desc_act": {"desc_act": True},
    "gptq 3 sym g32": {"bits": 3},
    "gptq 2 asym g64": {"bits": 2, "group_size": 64, "sym": False},
    "gptq 8 sym g128": {"bits": 8, "group_size": 128},
    "gptq 8 bits in down_proj": {"overrides": ("down_proj=bits:8,group_size:128",)},
    "gptq skipped block": {"overrides": (r"layers\.0\.=skip",)},
    "gptq lm_head": {"lm_head": True},
    "awq 4 asym g32": AWQ,
    "awq 4 one group": {**AWQ, "group_size": -1},
    "compressed 4 sym g32": COMPRESSED,
    "compressed 3 asym g32": {**COMPRESSED, "bits": 3, "sym": False},
    "compressed 2 asym g32": {**COMPRESSED, "bits": 2, "sym": False},
    "compressed 8 one group": {**COMPRESSED, "bits": 8, "group_size": -1},
    "compressed lm_head": {**COMPRESSED, "lm_head": True},
}
TWO_RANKS = ("gptq 3 sym g32", "gptq 4 one group", "gptq lm_head", "awq 4 asym g32", "compressed 2 asym g32")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokens(tmp_path_factory.mktemp("prompts") / "prompts.npy", random_tokens(4, 40, seed=9))


def ours(module: Path, prompts: Path) -> list[list[int]]:
    """Tokens of the module as qsun loads it, reading its own prompts."""
    decode = qsun.load_decode(module, device="cpu", dtype="float32")
    reader = qsun.PrefillModule(decode.model, decode.directory)
    rows = np.load(prompts, allow_pickle=False).tolist()
    return qsun.generate(reader, decode, rows, max_new_tokens=NEW_TOKENS, eos=())


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_ours(build: Build, probe: Probe, prompts, case):
    module = build("fp32", **CASES[case])
    answers = probe("vllm", "vllm_plugin_tokens.py", module, prompts, NEW_TOKENS)
    assert answers.tolist() == ours(module, prompts)


@pytest.mark.parametrize("case", TWO_RANKS)
def test_two_tensor_parallel_ranks_give_the_same_tokens(build: Build, probe: Probe, prompts, case):
    module = build("fp32", **CASES[case])
    answers = probe("vllm", "vllm_plugin_tokens.py", module, prompts, NEW_TOKENS, 2)
    assert answers.tolist() == ours(module, prompts)


def test_activation_order_is_refused_across_ranks(build: Build, probe: Probe, prompts):
    module = build("fp32", **CASES["gptq 4 desc_act"])
    with pytest.raises(ProbeFailedError, match=r"activation-ordered groups .desc_act., which tensor parallelism would"):
        probe("vllm", "vllm_plugin_tokens.py", module, prompts, NEW_TOKENS, 2)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "phi3"])
def test_families(probe: Probe, tmp_path, family):
    """Biases and tied embeddings (Qwen2), norms of q and k (Qwen3), projections that are fused on disk (Phi-3)."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "max_position_embeddings": 1024}
    base = build_model(tmp_path / "base", family, **sizes)
    tokens = save_tokens(tmp_path / "calibration.npy", random_tokens(8, 64, seed=1) % 125 + 3)
    asked = save_tokens(tmp_path / "prompts.npy", random_tokens(4, 40, seed=9) % 125 + 3)
    config = qsun.QuantConfig(method="gptq", group_size=32, samples=8, seq_len=64, sweeps=1)
    qsun.quantize(base, tmp_path / "decode", config, tokens, "cpu")
    answers = probe("vllm", "vllm_plugin_tokens.py", tmp_path / "decode", asked, NEW_TOKENS)
    assert answers.tolist() == ours(tmp_path / "decode", asked)
