"""A simulated in-process engine: prompts between steps, read side by side or in pieces, and a fair queue."""

import dataclasses
import math
import random

import pytest
import torch

from qsun.engine.config import EngineConfig, Sampling
from qsun.engine.engine import Engine
from qsun.engine.requests import Request as EngineRequest
from qsun.engine.state import EngineWatch
from qsun.eval.load.workload import Lengths, TracedRequest, Workload
from qsun.eval.simulate.curves import Curves
from qsun.eval.simulate.simulation import simulate
from qsun.eval.simulate.system import DecodeWorker, System
from qsun.runtime.decode_module import load_decode
from qsun.runtime.kv_cache import kv_bytes_per_token
from qsun.runtime.prefill_module import load_prefill

COSTS = Curves(lambda _, batch, __: 1.0, lambda tokens: 0.5 + 0.1 * tokens, "made up")  # a pass costs 0.5


def engine(models=("a", "b"), **worker):
    return System("engine", (DecodeWorker(models, **({"prefill_tokens": 8} | worker)),))


def test_a_prompt_is_read_before_the_step_that_it_joins():
    times = simulate([TracedRequest(0.0, "a", 5, 2)], engine(), COSTS).times[0]
    assert times.prefilled == pytest.approx(0.9)  # 4 tokens
    assert (times.first, times.last) == pytest.approx((1.9, 2.9))


def test_a_long_prompt_is_read_in_pieces_between_steps():
    """20 tokens are three turns of 8, 8 and 4; meanwhile a's row steps on, later by each turn."""
    trace = [TracedRequest(0.0, "a", 1, 5), TracedRequest(0.5, "b", 21, 1)]
    a, b = simulate(trace, engine(), COSTS).times
    turns = [0.5 + 0.8, 0.5 + 0.8, 0.5 + 0.4]
    assert a.first == pytest.approx(1.0)
    assert b.first == pytest.approx(1.0 + sum(turns) + 3)
    assert a.last == pytest.approx(1.0 + sum(turns) + 4)


def test_short_prompts_of_a_model_are_read_side_by_side_in_one_pass():
    """3 and 2 tokens of a make one pass over 2 x 3; b's prompt of 3 does not fit in what is left of 8 tokens."""
    trace = [TracedRequest(0.0, "a", 4, 1), TracedRequest(0.0, "b", 4, 1), TracedRequest(0.0, "a", 3, 1)]
    one, other, two = simulate(trace, engine(), COSTS).times
    assert one.prefilled == two.prefilled == pytest.approx(0.5 + 0.6)
    assert one.last == two.last == pytest.approx(2.1)
    assert other.last == pytest.approx(2.1 + 0.5 + 0.3 + 1)


def test_side_by_side_takes_what_was_measured_for_it():
    """Two prompts of 3 tokens: 7 s where that was measured, and otherwise as one prompt of 6."""
    trace = [TracedRequest(0.0, "a", 4, 1), TracedRequest(0.0, "a", 4, 1), TracedRequest(0.0, "b", 4, 1)]
    asked = []
    curves = dataclasses.replace(COSTS, group=lambda prompts, tokens: asked.append((prompts, tokens)) or 7.0)
    one, two, alone = simulate(trace, engine(), curves).times
    assert one.prefilled == two.prefilled == pytest.approx(7.0)
    assert alone.prefilled - one.last == pytest.approx(0.5 + 0.3)  # a single prompt is none of its business
    assert asked == [(2, 3)]
    assert COSTS.side_by_side(2, 3) == pytest.approx(COSTS.prefill(6))
    assert curves.side_by_side(2, 0) == 0.0


def test_a_long_prompt_lets_others_in_between():
    """a's 24 tokens take three turns; b's 2 tokens, asked for a little later, do not wait for the last."""
    trace = [TracedRequest(0.0, "a", 25, 1), TracedRequest(0.1, "b", 3, 1)]
    long, short = simulate(trace, engine(), COSTS).times
    assert short.prefilled < long.prefilled


def test_places_are_held_while_a_prompt_is_read():
    trace = [TracedRequest(0.0, "a", 17, 1), TracedRequest(0.0, "a", 2, 1)]
    first, second = simulate(trace, engine(max_batch=1), COSTS).times
    assert second.joined == pytest.approx(first.last)


def test_a_fair_queue_lets_a_quiet_model_pass_a_burst():
    burst = [TracedRequest(0.0, "a", 2, 5) for _ in range(6)]
    trace = [*burst, TracedRequest(0.1, "b", 2, 5)]
    waits = {fair: simulate(trace, engine(max_batch=1, fair=fair), COSTS).times[-1].joined for fair in (True, False)}
    assert waits[True] < waits[False]
    order = [t.joined for t in simulate(trace, engine(max_batch=1, fair=True), COSTS).times]
    assert order[-1] == sorted(order)[1]  # right after the request that ran when it came


def test_turns_and_sharing_do_the_same_work_at_different_speed():
    trace = Workload(("a", "b"), 1.0, Lengths("uniform", 1, 30), Lengths("uniform", 1, 9), 2).trace(math.inf, 200)
    apart, together = (simulate(trace, engine(turns=turns, max_batch=8), COSTS) for turns in (True, False))
    tokens = sum(request.output_tokens for request in trace)
    assert apart.decode[0].rows == together.decode[0].rows == tokens
    assert apart.seconds > together.seconds
    assert apart.decode[0].busy == pytest.approx(apart.seconds)


class Rows(EngineWatch):
    def __init__(self):
        self.seen = []

    def step(self, rows, seconds):
        self.seen.append(rows)


@pytest.mark.parametrize("partitioned", [False, True])
@pytest.mark.parametrize(
    ("max_batch", "prefill_tokens", "kv_tokens"),
    [(64, 512, 1 << 14), (5, 512, 1 << 14), (6, 24, 1 << 14), (64, 512, 600), (6, 24, 300)],
)
def test_batches_are_those_of_the_real_engine(talking_model, partitioned, max_batch, prefill_tokens, kv_tokens):
    """The real engine and the simulated one are given the same burst: each decode step has the same rows in both."""
    rng, names = random.Random(4), ("a", "b", "c")
    trace = [
        TracedRequest(0.0, names[i] if i < 3 else rng.choice(names), rng.randint(1, 60), rng.randint(1, 12))
        for i in range(40)
    ]
    watch = Rows()
    decode = load_decode(str(talking_model))
    kv_bytes = kv_tokens * kv_bytes_per_token(decode.model.config, torch.bfloat16)
    config = EngineConfig(max_batch, kv_bytes, 0, prefill_tokens, partitioned=partitioned)
    real = Engine(decode, config, watch)
    for name in names:  # each a module of its own: prompts of one module are read together
        real.add_module(name, load_prefill(str(talking_model), decode))
    for number, request in enumerate(trace):
        tokens = tuple(rng.randrange(3, 128) for _ in range(request.prompt_tokens))
        sampling = Sampling(max_new_tokens=request.output_tokens, ignore_eos=True)
        real.submit(EngineRequest(str(number), request.model, tokens, sampling))
    while not real.idle:
        real.step()
    seen = []
    noted = Curves(lambda _, batch, __: seen.append(batch) or 1.0, lambda tokens: 0.0, "made up")
    sizes = {"max_batch": max_batch, "prefill_tokens": prefill_tokens, "kv_tokens": kv_tokens}
    simulate(trace, engine(names, turns=partitioned, fair=True, padded=True, **sizes), noted)
    assert seen == watch.seen
