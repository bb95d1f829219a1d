"""The other way round: GPTQModel quantizes the packaged base on the CPU, and qsun.load_decode reads what it wrote."""

import json
from pathlib import Path

import pytest
import torch

from qsun.demo import base_directory
from tests.oracles.bases import with_own_head
from tests.oracles.compare import difference, our_logits, record, relative
from tests.oracles.conftest import Probe

pytestmark = pytest.mark.oracle

BFLOAT16_NOISE = 0.04
CASES = {
    "v1 4 sym g32": {"bits": 4, "sym": True, "format": "gptq"},
    "v1 3 sym g32 desc_act": {"bits": 3, "sym": True, "desc_act": True, "format": "gptq"},
    "v2 4 asym g32": {"bits": 4, "sym": False, "format": "gptq_v2"},
    "v2 2 asym g32": {"bits": 2, "sym": False, "format": "gptq_v2"},
}


@pytest.fixture(scope="module")
def quantized(probe: Probe, demo_tokens, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What GPTQModel wrote for each case."""
    root = tmp_path_factory.mktemp("gptqmodel")
    made = {}
    for number, (case, settings) in enumerate(CASES.items()):
        made[case] = root / str(number)
        wanted = json.dumps({"group_size": 32, "desc_act": False} | settings)
        probe("gptqm", "gptqmodel_quantize.py", base_directory(), made[case], demo_tokens, wanted)
    return made


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(probe: Probe, quantized, demo_tokens, case):
    written = json.loads((quantized[case] / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    theirs = probe("gptqm", "transformers_logits.py", "bfloat16", demo_tokens, quantized[case])[0]
    noise = relative(theirs, our_logits(quantized[case], demo_tokens, torch.float32))
    record("reads gptqmodel", case=case, relative=noise, format=written["checkpoint_format"])
    assert written["checkpoint_format"] == CASES[case]["format"]
    assert noise < BFLOAT16_NOISE


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("v1")])
def test_logits_are_those_of_auto_gptq(probe: Probe, quantized, demo_tokens, tmp_path, case):
    """In float32, to the last bits; with_own_head because of test_auto_gptq.py's finding about tied embeddings."""
    own = with_own_head(quantized[case], tmp_path / "own")
    theirs = probe("agptq", "auto_gptq_logits.py", demo_tokens, own)[0]
    measured = difference(theirs, our_logits(quantized[case], demo_tokens, torch.float32))
    record("reads gptqmodel, against auto-gptq", case=case, difference=measured)
    assert measured < 1e-4
