"""Each row gets the tokens that it gets alone, whatever lengths share its batch, for every RoPE of transformers."""

import random

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import qsun
from qsun.engine.config import EngineConfig, Sampling
from qsun.engine.engine import Engine
from qsun.engine.requests import Request
from qsun.runtime.seam import IGNORED, SeamBatch
from tests.engine_rig import run_until_idle, tokens_of
from tests.seam_oracle import monolithic_logits, seam_logits
from tests.tiny_models import reference

BOUNDARY, NEW = 48, 10
TYPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": {
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + 3 * i for i in range(8)],
        "original_max_position_embeddings": BOUNDARY,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "proportional": {"factor": 4.0, "partial_rotary_factor": 0.5},
}
LENGTHS = (1, 7, 33, BOUNDARY - NEW + 1, BOUNDARY + 2, 100)


@pytest.fixture
def rope_model(tiny_model):
    def make(kind, **changes):
        rope = {"rope_type": kind, "rope_theta": 10000.0} | TYPES[kind]
        family = "phi3" if kind == "longrope" else "llama"
        more = {"original_max_position_embeddings": BOUNDARY} if kind == "longrope" else {}
        return tiny_model(family, rope_parameters=rope, initializer_range=0.35, **more, **changes)

    return make


@pytest.fixture
def pair(rope_model):
    def make(kind):
        decode = qsun.load_decode(rope_model(kind), dtype="float32", device="cpu")
        return qsun.load_prefill(rope_model(kind), decode, dtype="float32"), decode

    return make


def prompts_of(lengths):
    rng = random.Random(3)
    start = [rng.randrange(3, 128) for _ in range(64)]  # in common, so that prefixes are found in the cache
    return [[*start, *(rng.randrange(3, 128) for _ in range(100))][:length] for length in lengths]


def alone(directory, prompt):
    """transformers' answer, each token computed from the whole sequence."""
    model, tokens = reference(directory), list(prompt)
    with torch.no_grad():
        for _ in range(NEW):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_no_type_is_forgotten():
    assert set(ROPE_INIT_FUNCTIONS) | {"default"} <= set(TYPES)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind == "default" or kind in ROPE_INIT_FUNCTIONS])
def test_rows_of_all_lengths_side_by_side(pair, rope_model, kind):
    prefill, decode = pair(kind)
    prompts = prompts_of(LENGTHS)
    expected = [alone(rope_model(kind), prompt) for prompt in prompts]
    for settings in ({}, {"prefill_chunk": 9}, {"static": True}, {"batch_size": 2}):
        assert qsun.generate(prefill, decode, prompts, max_new_tokens=NEW, eos=(), **settings) == expected, settings


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_prefixes_from_the_cache(pair, kind):
    """The second round finds prefixes; a long prompt must not find those of short ones, or the other way round."""
    prefill, decode = pair(kind)
    engine = Engine(decode, EngineConfig(kv_bytes=8 << 20, prefill_tokens=20))
    engine.add_module("m", prefill)
    prompts = prompts_of((38, 39, 64, 100))
    expected = qsun.generate(prefill, decode, prompts, max_new_tokens=NEW, eos=())
    cached = []
    for turn in range(2):
        for number in (3, 0, 1, 2):
            settings = Sampling(max_new_tokens=NEW, ignore_eos=True)
            engine.submit(Request("a", "m", tuple(prompts[number]), settings))
            updates = run_until_idle(engine)["a"]
            assert tokens_of(updates) == expected[number], (turn, number)
            cached.append(updates[0].cached_tokens)
    assert cached[4:] == [96, 32, 32, 32]
    assert cached[1] == (0 if kind == "longrope" else 32)


def test_what_crosses_the_boundary_of_longrope_is_refused_in_one_line(pair):
    prefill, decode = pair("longrope")
    for prompt, says in ((40, "crosses the model's 48 tokens, .*; use 9 or less, or a longer prompt"), (49, "another")):
        with pytest.raises(qsun.QsunError, match=says):
            qsun.generate(prefill, decode, [[5] * prompt], max_new_tokens=NEW)
    engine = Engine(decode, EngineConfig(kv_bytes=8 << 20))
    assert [engine.room(prompt) for prompt in (40, 49, 50, 128)] == [9, 0, 79, 1]
    assert len(qsun.generate(prefill, decode, [[5] * 40], max_new_tokens=9, eos=())[0]) == 9
    assert len(qsun.generate(prefill, decode, [[5] * 50], max_new_tokens=NEW, eos=())[0]) == NEW


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_training_batches_of_all_lengths(pair, kind):
    """Rows of a padded batch have the logits that they have alone."""
    prefill, decode = pair(kind)
    rng = torch.Generator().manual_seed(1)

    def batch(rows):
        P, R = (max(row[i] for row in rows) for i in (0, 1))
        prefix, rest = (torch.randint(3, 128, (len(rows), n), generator=rng) for n in (P, R))
        labels = torch.full((len(rows), R), IGNORED)
        for number, (_, kept) in enumerate(rows):
            labels[number, :kept] = 7
        return SeamBatch(prefix, rest, labels, P - torch.tensor([row[0] for row in rows]))

    rows = [(0, 4), (12, 8), (30, 18), (60, 5), (90, 18)]
    together = batch(rows)
    seam = seam_logits(prefill.model, decode.model, together)
    whole = monolithic_logits(decode.model, together)
    for number, (prefix, rest) in enumerate(rows):
        one = SeamBatch(
            together.prefix[number : number + 1, together.prefix.shape[1] - prefix :],
            together.rest[number : number + 1, :rest],
            together.labels[number : number + 1, :rest],
            torch.zeros(1, dtype=torch.int64),
        )
        torch.testing.assert_close(seam[number, :rest], seam_logits(prefill.model, decode.model, one)[0])
        torch.testing.assert_close(whole[number, :rest], monolithic_logits(decode.model, one)[0])
