"""The simulator against queueing theory, conservation laws, an example by hand, and itself."""

import itertools
import math
import statistics

import pytest

from qsun.errors import QsunError
from qsun.eval.load.service_level import ServiceLevel
from qsun.eval.load.workload import Lengths, TracedRequest, Workload
from qsun.eval.simulate.curves import Curves
from qsun.eval.simulate.simulation import simulate
from qsun.eval.simulate.system import LEAST, POLICIES, POWER_OF_TWO, ROUND_ROBIN, DecodeWorker, System

FIXED = Lengths("fixed", 1)


def curves(step=lambda variant, batch, context: 1.0, prefill=lambda tokens: 0.0):
    return Curves(step, prefill, "made up")


def shared(models, workers=1, prefill=1, **worker):
    return System("test", (DecodeWorker(models, **worker),) * workers, dict.fromkeys(models, prefill))


def test_three_requests_by_hand():
    """Steps take 1 + 0.1 a row; prompts 0.5 a token. Read by one prefill worker, at most two rows at once.

    a (prompt 3, 2 tokens) is read 0.0-1.0, b (prompt 2, 3 tokens) 1.0-1.5, c (prompt 1, 1 token) needs no reading.
    Step 1, a alone: 1.0-2.1. Step 2, a and b: 2.1-3.3, a is done. c, ready since 1.5, waits for a's place.
    Step 3, b and c: 3.3-4.5, c is done. Step 4, b: 4.5-5.6.
    """
    trace = [TracedRequest(0.0, "m", 3, 2), TracedRequest(0.2, "m", 2, 3), TracedRequest(0.4, "m", 1, 1)]
    system = shared(("m",), max_batch=2)
    result = simulate(trace, system, curves(lambda _, batch, __: 1 + 0.1 * batch, lambda tokens: 0.5 * tokens))
    a, b, c = result.times
    assert [t.prefilled for t in result.times] == pytest.approx([1.0, 1.5, 1.5])
    assert (a.joined, a.first, a.last) == pytest.approx((1.0, 2.1, 3.3))
    assert (b.joined, b.first, b.last) == pytest.approx((2.1, 3.3, 5.6))
    assert (c.joined, c.first, c.last) == pytest.approx((3.3, 4.5, 4.5))
    assert a.ttft == pytest.approx(2.1)
    assert b.tpot == pytest.approx(1.15)
    assert c.tpot is None
    assert result.decode[0].busy == pytest.approx(4.6)
    assert (result.decode[0].steps, result.decode[0].rows) == (4, 6)
    assert result.prefill["m"][0].busy == pytest.approx(1.5)
    assert result.tokens_per_s() == pytest.approx(6 / 5.6)
    assert result.goodput(ServiceLevel(ttft_ms=3200, tpot_ms=1210)) == pytest.approx(2 / 3)  # c waits for 4.1 s
    assert result.mean_batch() == pytest.approx(1.5)


def test_contexts_of_steps():
    """The first step attends to the prompt, each further one to a token more; rows are averaged, or padded."""
    seen = {"mean": [], "longest": []}
    trace = [TracedRequest(0.0, "m", 5, 3), TracedRequest(0.5, "m", 11, 2)]
    for name, padded in (("mean", False), ("longest", True)):
        noted = curves(lambda _, batch, context, seen=seen[name]: seen.append((batch, context)) or 1.0)
        simulate(trace, shared(("m",), padded=padded), noted)
    assert seen["mean"] == [(1, 5), (2, (6 + 11) / 2), (2, (7 + 12) / 2)]
    assert seen["longest"] == [(1, 5), (2, 11), (2, 12)]


def test_longest_context_by_brute_force():
    trace = Workload(("m",), 0, Lengths("uniform", 1, 50), Lengths("uniform", 1, 30), 3).trace(0.4, 200)
    seen = []
    noted = curves(lambda _, batch, context: seen.append(context) or 1.0)
    result = simulate(trace, shared(("m",), padded=True, max_batch=6), noted)
    starts = sorted({t.joined for t in result.times} | {t.last for t in result.times})
    steps = []
    now = starts[0]
    while len(steps) < len(seen):
        running = [t for t in result.times if t.joined <= now < t.last]
        if running:
            steps.append(max(t.request.prompt_tokens + round(now - t.joined) for t in running))
            now += 1.0
        else:
            now = min(t.joined for t in result.times if t.joined > now)
    assert seen == steps


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_row_of_one_token_is_an_md1_queue(load):
    """Mean wait of M/D/1: load x service / (2 (1 - load)) (Pollaczek and Khinchine)."""
    service = 0.1
    trace = Workload(("m",), 0, FIXED, FIXED, 7).trace(load / service, 60_000)
    result = simulate(trace, shared(("m",), max_batch=1), curves(lambda *_: service), warm_up=0.05)
    wait = statistics.fmean(t.ttft - service for t in result.measured)
    assert wait == pytest.approx(load * service / (2 * (1 - load)), rel=0.06)
    assert result.utilisation() == pytest.approx(load, rel=0.02)


def test_prefill_workers_are_an_md1_queue_too():
    load, service = 0.7, 0.05
    trace = Workload(("m",), 0, Lengths("fixed", 11), FIXED, 5).trace(load / service, 60_000)
    result = simulate(trace, shared(("m",)), curves(lambda *_: 1e-9, lambda tokens: service * tokens / 10))
    wait = statistics.fmean(t.prefilled - t.request.arrival - service for t in result.times)
    assert wait == pytest.approx(load * service / (2 * (1 - load)), rel=0.06)


def test_two_prefill_workers_by_lindley():
    """M/D/2: the n-th waits for the lesser of the two times at which workers get free."""
    trace = Workload(("m",), 0, Lengths("uniform", 2, 40), FIXED, 5).trace(1.0, 500)
    system = shared(("m",), prefill=2)
    result = simulate(trace, system, curves(lambda *_: 1e-9, lambda tokens: tokens / 12))
    free = [0.0, 0.0]
    assert len(result.times) == 500
    for times in result.times:
        start = max(times.request.arrival, min(free))
        free[free.index(min(free))] = start + (times.request.prompt_tokens - 1) / 12
        assert times.prefilled == pytest.approx(start + (times.request.prompt_tokens - 1) / 12)


@pytest.mark.parametrize("policy", POLICIES)
def test_littles_law_and_conservation(policy):
    """Requests in the system, averaged over time, are rate x mean stay; no token is lost, no worker idles with work."""
    models = ("a", "b", "c")
    trace = Workload(models, 1.0, Lengths("uniform", 1, 60), Lengths("uniform", 1, 40), 1).trace(0.8, 3000)
    system = System("s", (DecodeWorker(models, max_batch=8),) * 3, dict.fromkeys(models, 1), policy)
    result = simulate(trace, system, curves(lambda _, b, c: 0.1 + 0.01 * b + 1e-4 * b * c, lambda n: 0.01 * n))
    events = sorted(
        [(t.request.arrival, 1) for t in result.times] + [(t.last, -1) for t in result.times], key=lambda e: e[0]
    )
    area = inside = 0.0
    for (now, change), (then, _) in itertools.pairwise(events):
        inside += change
        area += inside * (then - now)
    span = events[-1][0] - events[0][0]
    stay = statistics.fmean(t.last - t.request.arrival for t in result.times)
    assert area / span == pytest.approx(len(trace) / span * stay)
    rows = sum(load.rows for load in result.decode)
    assert rows == sum(request.output_tokens for request in trace)
    for index, load in enumerate(result.decode):  # busy exactly while it holds a request
        held = sorted((t.joined, t.last) for t in result.times if t.worker == index)
        union, end = 0.0, -math.inf
        for begin, finish in held:
            union += max(0.0, finish - max(begin, end))
            end = max(end, finish)
        assert load.busy == pytest.approx(union)


def test_limits_hold_at_every_moment():
    trace = Workload(("a", "b"), 1.0, Lengths("uniform", 1, 60), Lengths("uniform", 1, 40), 1).trace(math.inf, 300)
    worker = DecodeWorker(("a", "b"), max_batch=5, kv_tokens=250)
    result = simulate(trace, System("s", (worker,), {"a": 1, "b": 1}), curves())
    moments = [t.joined for t in result.times]
    for now in moments:
        held = [t.request for t in result.times if t.joined <= now < t.last]
        assert len(held) <= 5
        assert sum(request.prompt_tokens + request.output_tokens for request in held) <= 250
    assert result.mean_batch() > 3


def test_turns_run_every_models_batch_once_a_step():
    """Two models of one row each: own batches in turns take two steps a token, a shared batch takes one."""
    trace = [TracedRequest(0.0, "a", 1, 10), TracedRequest(0.0, "b", 1, 10)]
    apart = simulate(trace, shared(("a", "b"), turns=True), curves())
    together = simulate(trace, shared(("a", "b")), curves())
    assert apart.tpots_ms() == [2000, 2000]
    assert together.tpots_ms() == [1000, 1000]
    assert (apart.decode[0].steps, together.decode[0].steps) == (20, 10)


def test_one_model_does_not_see_whether_there_are_turns():
    trace = Workload(("m",), 0, Lengths("uniform", 1, 9), Lengths("uniform", 1, 9), 2).trace(0.5, 300)
    slower = curves(lambda _, batch, context: 0.5 + 0.1 * batch + 0.01 * context, lambda tokens: 0.01 * tokens)
    apart, together = (simulate(trace, shared(("m",), turns=turns), slower) for turns in (True, False))
    assert apart.times == together.times


def test_uniform_skew_and_a_worker_a_model_are_as_good_as_shared_ones_at_low_load():
    models = ("a", "b", "c", "d")
    trace = Workload(models, 0, Lengths("fixed", 10), Lengths("uniform", 5, 30), 4).trace(0.05, 1500)
    flat = curves(lambda *_: 0.1, lambda tokens: 0.01 * tokens)
    own = System("own", tuple(DecodeWorker((model,)) for model in models), dict.fromkeys(models, 1))
    first, second = (simulate(trace, system, flat) for system in (own, shared(models, 4)))
    assert statistics.fmean(first.tpots_ms()) == pytest.approx(statistics.fmean(second.tpots_ms()))
    assert statistics.fmean(first.ttfts_ms()) == pytest.approx(statistics.fmean(second.ttfts_ms()), rel=0.05)
    assert first.steady_tokens_per_s() == pytest.approx(second.steady_tokens_per_s(), rel=0.01)


def test_policies_choose_as_they_say():
    trace = [TracedRequest(0.1 * i, "m", 1, length) for i, length in enumerate((90, 2, 2, 2, 2, 2))]
    chosen = {}
    for policy in (LEAST, ROUND_ROBIN):
        system = System("s", (DecodeWorker(("m",)),) * 2, {"m": 1}, policy)
        chosen[policy] = [t.worker for t in simulate(trace, system, curves()).times]
    assert chosen[LEAST] == [0, 1, 1, 1, 1, 1]
    assert chosen[ROUND_ROBIN] == [0, 1, 0, 1, 0, 1]


def test_counting_tokens_balances_better_than_turns_and_the_seed_decides():
    trace = Workload(("m",), 0, FIXED, Lengths.parse("lognormal:20,0.7,100"), 0).trace(2.4, 1500)
    waits = {}
    for policy in POLICIES:
        system = System("s", (DecodeWorker(("m",), max_batch=4),) * 6, {"m": 1}, policy)
        result = simulate(trace, system, curves(lambda *_: 0.3))
        waits[policy] = statistics.fmean(result.ttfts_ms())
    assert max(waits[LEAST], waits[POWER_OF_TWO]) < waits[ROUND_ROBIN]
    system = System("s", (DecodeWorker(("m",), max_batch=4),) * 6, {"m": 1}, POWER_OF_TWO)
    runs = [simulate(trace, system, curves(lambda *_: 0.3), seed=seed).times for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_transfer_and_overhead_are_added():
    trace = [TracedRequest(0.0, "m", 1, 3)]
    system = System("s", (DecodeWorker(("m",)),), {"m": 1}, transfer_ms=200, step_overhead_ms=50)
    times = simulate(trace, system, curves()).times[0]
    assert (times.first, times.last) == pytest.approx((1.25, 3.35))


def test_statistics_leave_the_warm_up_out_and_count_steady_tokens():
    trace = [TracedRequest(float(i), "m", 1, 2) for i in range(10)]
    result = simulate(trace, shared(("m",)), curves(lambda *_: 0.25), warm_up=0.5)
    assert len(result.ttfts_ms()) == 5
    assert result.steady_tokens_per_s() == pytest.approx(2 * 4 / 4)  # arrivals 5 to 9: the answers of four of them
    assert result.tokens_per_s() == pytest.approx(20 / 9.5)
    summary = result.summary(ServiceLevel(1000, 1000))
    assert summary["tpot_ms"]["p99"] == pytest.approx(250)
    assert summary["tokens_per_s_per_worker"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("trace", "system", "problem"),
    [
        ([], shared(("m",)), "no requests"),
        ([TracedRequest(1.0, "m", 1, 1), TracedRequest(0.0, "m", 1, 1)], shared(("m",)), "not in order"),
        ([TracedRequest(0.0, "x", 1, 1)], shared(("m",)), "serves model 'x'"),
        (
            [TracedRequest(0.0, "m", 8, 3)],
            shared(("m",), kv_tokens=10),
            "takes 11 tokens of KV; a decode worker has 10",
        ),
        ([TracedRequest(0.0, "m", 1, 1)], System("s", (DecodeWorker(("m",)),), {"x": 1}), "no prefill worker"),
    ],
)
def test_what_cannot_be_simulated(trace, system, problem):
    with pytest.raises(QsunError, match=problem):
        simulate(trace, system, curves())


def test_systems_that_are_none():
    for made, problem in (
        (lambda: System("s", ()), "no decode workers"),
        (lambda: System("s", (DecodeWorker(("m",)),)), "has no worker to read prompts"),
        (lambda: shared(("m",), max_batch=0), "limit of 0"),
        (lambda: System("s", (DecodeWorker(("m",)),), {"m": 1}, "best"), "policy 'best'"),
    ):
        with pytest.raises(QsunError, match=problem):
            made()
