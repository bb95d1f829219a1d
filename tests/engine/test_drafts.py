"""Drafted tokens change how fast tokens come, and never which: whatever is drafted, right or wrong, long or short."""

import random

import pytest
import torch

import qsun
from qsun.engine.config import EngineConfig, Sampling
from qsun.engine.decode.decode_step import DecodeStep
from qsun.engine.engine import Engine
from qsun.engine.requests import Request
from qsun.errors import QsunError
from qsun.runtime.tokens.drafts import Drafts
from tests.engine_rig import KV_BYTES_PER_TOKEN, run_until_idle, tokens_of
from tests.tiny_models import FAMILIES

SETTINGS = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "top_p": 0.9, "top_k": 30},
    "penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.5, "min_new_tokens": 6},
    "stop": {"stop": ("e", "in"), "logprobs": 2},
}


def brute_force(tokens, most):
    """What followed the last occurrence of the longest of the last 4, 3 or 2 tokens, going on in a loop at the end."""
    for length in (4, 3, 2):
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == tokens[-length:]:
                found = list(tokens)
                for _ in range(most):
                    found.append(found[start + length + len(found) - len(tokens)])
                return found[len(tokens) :]
    return []


@pytest.mark.parametrize("vocabulary", [2, 3, 6, 40])
def test_a_draft_is_what_came_after_the_same_tokens(vocabulary):
    rng = random.Random(vocabulary)
    tokens = [rng.randrange(vocabulary) for _ in range(rng.randrange(30))]
    drafts = Drafts(tokens, 8)
    for _ in range(60):
        room = rng.randrange(0, 8)
        assert drafts.propose(room) == brute_force(tokens, 8)[:room]
        tokens.append(rng.randrange(vocabulary))
        drafts.add(tokens[-1])


def test_drafts_that_fail_get_short_and_rare_and_come_back():
    drafts, lengths = Drafts([7, 8, 9] * 4, 8), []
    for number in range(40):
        draft = drafts.propose(8)
        lengths.append(len(draft))
        for token in (100 + number, 7, 8):  # what follows 7, 8 is new each time
            drafts.add(token)
        if draft:
            drafts.judge(draft)
    assert lengths[0] == 8 and 1 in lengths and lengths.count(0) > 25
    for _ in range(80):
        draft = drafts.propose(8)
        for _ in range(8):
            drafts.add(5)
        if draft:
            drafts.judge(draft)
    assert drafts.propose(8) == [5] * 8


def test_a_draft_counts_only_for_what_came():
    drafts = Drafts([5, 6] * 4, 8)
    draft = drafts.propose(8)
    drafts.add(draft[0])  # and with it the row ended
    assert len(draft) == 8 and drafts.judge(draft) == 1


def requests_of(names, settings, count=9):
    rng = random.Random(5)
    made = []
    for i in range(count):
        tokens = tuple(rng.randrange(3, 128) for _ in range(rng.choice((1, 2, 9, 33))))
        sampling = Sampling(max_new_tokens=rng.randrange(8, 40), seed=i, **settings)
        made.append(Request(f"r{i}", names[i % len(names)], tokens, sampling))
    return made


def answers(engine, requests):
    for request in requests:
        engine.submit(request)
    updates = run_until_idle(engine)
    return {
        name: (tokens_of(u), "".join(x.text for x in u), [x.finish for x in u if x.finish])
        for name, u in updates.items()
    }


def engine_of(decode, prefills, **settings):
    engine = Engine(decode, EngineConfig(kv_bytes=64 << 20, **settings))
    for name, module in prefills.items():
        engine.add_module(name, module)
    return engine


def draft_by(known, requests, monkeypatch, seed):
    """Drafts that know the answers and spoil them at random; returns how many of them were fed."""
    by_prompt, rng, fed = {r.tokens: known[r.id][0] for r in requests}, random.Random(seed), []

    def propose(self, room):
        prompt = next(p for p in by_prompt if tuple(self._tokens[: len(p)]) == p and len(self._tokens) >= len(p))
        answer = by_prompt[prompt][len(self._tokens) - len(prompt) :]
        draft = [token if rng.random() < 0.8 else rng.randrange(3, 128) for token in answer]
        self._drafted_at = len(self._tokens)
        fed.append(draft[: rng.randrange(room + 1)])
        return fed[-1]

    monkeypatch.setattr(Drafts, "propose", propose)
    return fed


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_tokens_texts_and_ends_are_those_without_drafts(decode, prefills, settings, monkeypatch):
    requests = requests_of(list(prefills), settings)
    expected = answers(engine_of(decode, prefills), requests)
    assert answers(engine_of(decode, prefills, speculate=5), requests) == expected
    fed = draft_by(expected, requests, monkeypatch, seed=1)
    assert answers(engine_of(decode, prefills, speculate=5), requests) == expected
    assert sum(map(len, fed)) > 50


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, tiny_model, monkeypatch):
    decode = qsun.load_decode(tiny_model(family), "cpu", torch.float32)
    prefills = {"one": qsun.load_prefill(tiny_model(family), decode, dtype="float32")}
    requests = requests_of(["one"], {"ignore_eos": True})
    expected = answers(engine_of(decode, prefills), requests)
    draft_by(expected, requests, monkeypatch, seed=2)
    assert answers(engine_of(decode, prefills, speculate=7), requests) == expected


def test_what_a_wrong_draft_computed_does_not_stay(decode, prefills, monkeypatch):
    """Keys and values of NaN in columns that count for nothing yet would reach other rows: 0 x NaN is NaN."""
    requests = requests_of(list(prefills), {"ignore_eos": True}, count=4)
    expected = answers(engine_of(decode, prefills), requests)
    by_prompt, call = {r.tokens: expected[r.id][0] for r in requests}, DecodeStep.__call__

    def wrong(self, room):
        self._drafted_at = len(self._tokens)
        (prompt,) = (p for p in by_prompt if tuple(self._tokens[: len(p)]) == p)
        return [by_prompt[prompt][len(self._tokens) - len(prompt)] ^ 1] if room else []

    def broken(self, tokens):
        logits = call(self, tokens).clone()
        for row, fed in enumerate(tokens):
            logits[row, 1:] = torch.nan
            for buffer in (b for pair in self.cache.buffers for b in pair):
                buffer[row, :, self.cache.filled[row] :][:, : len(fed) - 1] = torch.nan
        return logits

    monkeypatch.setattr(Drafts, "propose", wrong)
    monkeypatch.setattr(DecodeStep, "__call__", broken)
    engine, seen = engine_of(decode, prefills, speculate=3), {}
    engine.submit(*requests)
    while not engine.idle:
        for update in engine.step():
            seen.setdefault(update.request, []).extend(update.tokens)
        (batch,) = engine._batches.values()
        assert all(bool(b.isfinite().all()) for pair in batch.cache.buffers for b in pair)
    assert {name: tokens for name, (tokens, *_) in expected.items()} == seen


def test_a_loop_takes_fewer_steps(decode, prefills, monkeypatch):
    request = Request("r", next(iter(prefills)), (5, 6, 7, 8), Sampling(max_new_tokens=60, ignore_eos=True))
    plain = engine_of(decode, prefills)
    expected = answers(plain, [request])
    draft_by(expected, [request], monkeypatch, seed=3)
    engine = engine_of(decode, prefills, speculate=8)
    engine.submit(request)
    steps = 0
    while not engine.idle:
        engine.step()
        steps += 1
    assert steps < 45


def test_the_budget_counts_what_drafts_may_write(decode, prefills):
    name = next(iter(prefills))
    engine = Engine(decode, EngineConfig(kv_bytes=40 * KV_BYTES_PER_TOKEN, speculate=8))
    engine.add_module(name, prefills[name])
    assert engine.room(3) == 40 - 8 + 1 - 3
    engine.check(Request("fits", name, (5, 6, 7), Sampling(max_new_tokens=30)))
    with pytest.raises(QsunError, match="the engine has 32"):
        engine.check(Request("not", name, (5, 6, 7), Sampling(max_new_tokens=31)))
    assert tokens_of(run(engine, Request("fits", name, (5, 6, 7), Sampling(max_new_tokens=30, ignore_eos=True))))


def run(engine, request):
    engine.submit(request)
    return run_until_idle(engine)[request.id]


def test_fixed_shapes_and_drafts_exclude_each_other(decode):
    with pytest.raises(QsunError, match="speculate"):
        Engine(decode, EngineConfig(static=True, speculate=4))
