"""Shaped logits against loops over tokens in float64, and against transformers' processor for repetition."""

import random

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from qsun.runtime.tokens.sampling import LogitShaping

PLAIN = {
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "bias": {},
    "min_new_tokens": 0,
    "ends": (),
    "constraint": None,
}
VOCABULARY = 17
INF = float("inf")


class Evens:
    """Allows even tokens only, and remembers what was chosen."""

    def __init__(self):
        self.taken = []

    def mask(self, logits):
        logits[1::2] = -INF

    def advance(self, token):
        self.taken.append(token)


def brute_force(logits, prompt, answer, settings):
    found = logits.double().tolist()
    s = PLAIN | settings
    for token in range(VOCABULARY):
        count = answer.count(token)
        if count or token in prompt:
            found[token] *= 1 / s["repetition_penalty"] if found[token] > 0 else s["repetition_penalty"]
        found[token] -= s["frequency_penalty"] * count + s["presence_penalty"] * (count > 0)
        found[token] += s["bias"].get(token, 0.0)
        if len(answer) < s["min_new_tokens"] and token in s["ends"]:
            found[token] = -INF
        if s["constraint"] is not None and token % 2:
            found[token] = -INF
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"frequency_penalty": 0.9},
        {"presence_penalty": -1.1},
        {"bias": {3: 5.0, 16: -100.0}},
        {"min_new_tokens": 3, "ends": {2, 5}},
        {"constraint": True},
        {
            "repetition_penalty": 1.3,
            "frequency_penalty": -0.4,
            "presence_penalty": 0.7,
            "bias": {5: 50.0, 0: 1.5},
            "min_new_tokens": 2,
            "ends": {5},
            "constraint": True,
        },
    ],
    ids=lambda s: "-".join(s) or "nothing",
)
def test_every_step_is_what_loops_over_tokens_give(settings):
    settings = settings | ({"constraint": Evens()} if "constraint" in settings else {})
    rng, prompt, answer = random.Random(1), [4, 4, 9, 0], []
    shaping = LogitShaping(prompt, torch.zeros(VOCABULARY), **(PLAIN | settings))
    for step in range(6):
        logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(step)) * 3
        wanted = brute_force(logits, prompt, answer, settings)
        shaping.apply(logits)
        torch.testing.assert_close(logits.double(), wanted, rtol=1e-6, atol=1e-6)
        answer.append(rng.choice([2, 4, 6, 6, 8]))
        shaping.advance(answer[-1])
    if "constraint" in settings:
        assert settings["constraint"].taken == answer


def test_repetition_is_that_of_transformers():
    prompt, logits = [1, 5, 5, 11], torch.randn(VOCABULARY)
    shaping = LogitShaping(prompt, logits, **(PLAIN | {"repetition_penalty": 1.4}))
    shaping.advance(7)
    wanted = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([[*prompt, 7]]), logits[None].clone())[0]
    shaping.apply(logits)
    torch.testing.assert_close(logits, wanted)
