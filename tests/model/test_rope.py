"""RoPE that depends on the longest position: examples of a batch stay where each is computed as it is alone."""

import random

import pytest
import torch

import qsun
from qsun.data.examples import TokenExample
from qsun.model.architectures import positions_of_one_rope
from qsun.model.skeleton import read_model_config
from qsun.runtime.seam import seam_logits
from qsun.tuning.examples import collate

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + 4 * i for i in range(8)],
    "original_max_position_embeddings": 32,
}


@pytest.fixture
def phi3(tiny_model):
    return tiny_model("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=32)


def test_positions(tiny_model, phi3):
    assert positions_of_one_rope(read_model_config(phi3)) == 32
    assert positions_of_one_rope(read_model_config(tiny_model("llama"))) == 128


@pytest.mark.parametrize(("longest", "same"), [(32, True), (40, False)])
def test_a_row_is_computed_as_it_is_alone_within_these_positions(longest, same, phi3):
    """The second case shows why longer examples are left out."""
    r = random.Random(0)
    prompts = [tuple(r.randrange(3, 128) for _ in range(n)) for n in (10, longest - 2)]
    short, long = (TokenExample(prompt, (5, 2)) for prompt in prompts)
    model = qsun.load_decode(phi3, "cpu", torch.float32).model
    with torch.no_grad():
        alone, mixed = (seam_logits(model, model, collate(rows))[0] for rows in ([short], [short, long]))
    assert torch.allclose(alone, mixed, atol=1e-4) == same
