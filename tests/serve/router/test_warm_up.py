"""Handshakes of pairs while workers die, hang and leave, and which worker is blamed for a failed one."""

import asyncio

import httpx
import pytest

from qsun.serve.router.check import check_workers
from qsun.serve.router.exchange.identity import identity_fault
from tests.serve.routing import expected, rig, run, until


def state_of(r, fake):
    return next(worker for worker in r.state.fleet if worker.url == fake.url)


async def shaking_hands(r, prefill, decode):
    """A handshake of this pair that has come as far as the decode worker, which holds it at its gate."""
    decode.gate = asyncio.Event()
    r.forget()
    r.state.health.require_warm_up(state_of(r, prefill), state_of(r, decode))
    await until(lambda: decode.started == 1)


@pytest.mark.parametrize("failures", [1, 100])
def test_a_prefill_worker_that_restarts_in_the_middle_of_a_handshake_shakes_hands_again(failures):
    """With 1 failure its circuit is open meanwhile, and only another handshake can close it."""

    async def scenario():
        async with rig(models=("math",), decode=1, health={"failures": failures}) as r:
            (prefill,), (decode,) = r.prefill["math"], r.decode
            await shaking_hands(r, prefill, decode)
            await prefill.kill()
            await until(lambda: state_of(r, prefill).state == "down")
            await prefill.restart()
            await until(lambda: state_of(r, prefill).state == "ready")
            decode.gate.set()
            await r.ready()
            assert decode.handshakes[prefill.engine_id] == 1
            assert state_of(r, decode).breaker.failures == 0
            assert (await r.complete()).status_code == 200

    run(scenario)


def test_a_worker_that_leaves_in_the_middle_of_a_handshake_leaves_no_warm_pair():
    async def scenario():
        async with rig(models=("math",), decode=2) as r:
            (prefill,), (leaving, _) = r.prefill["math"], r.decode
            await shaking_hands(r, prefill, leaving)
            del r.decode[0]
            r.apply()
            leaving.gate.set()
            await until(lambda: leaving.finished == 1 and not r.state.health._warm_ups)
            assert not any(leaving.url in pair for pair in r.state.fleet.warm)
            await leaving.stop()

    run(scenario)


def test_a_warm_pair_is_probed_where_a_circuit_is_not_closed():
    async def scenario():
        async with rig(models=("math",), decode=1) as r:
            worker = state_of(r, r.decode[0])
            while worker.breaker.state == "closed":
                worker.breaker.fail()
            await until(lambda: worker.usable)
            assert len(r.state.fleet.warm) == 1

    run(scenario)


def hanging(worker):
    worker.first_seconds = 60.0 if worker.module == "weights of math" else 0.0


def test_a_prefill_worker_that_hangs_is_blamed_and_the_shared_decode_workers_are_not():
    async def scenario():
        health = {"warm_up_seconds": 0.2, "warm_up_attempts": 1, "failures": 2, "cool_down_seconds": 60.0}
        async with rig(ready=False, prepare=hanging, health=health) as r:
            hung = state_of(r, r.prefill["math"][0])
            await until(lambda: hung.breaker.state == "open")
            assert hung.reason.endswith("warm-up: no answer in 0.2 seconds")
            assert all(state_of(r, worker).breaker.failures == 0 for worker in r.decode)
            await until(lambda: r.state.fleet.without_a_pair() == ["math"])
            assert (await r.complete("code")).status_code == 200

    run(scenario)


def test_a_prefill_worker_that_refuses_the_warm_up_is_blamed():
    async def scenario():
        health = {"warm_up_attempts": 1, "failures": 1, "cool_down_seconds": 60.0}
        prepare = lambda w: setattr(w, "statuses", [400] if w.role == "prefill" else [])  # noqa: E731
        async with rig(models=("math",), decode=1, ready=False, prepare=prepare, health=health) as r:
            await until(lambda: any(worker.breaker.state == "open" for worker in r.state.fleet))
            assert state_of(r, r.decode[0]).breaker.state == "closed"

    run(scenario)


def test_a_partition_between_two_workers_costs_neither_of_them_the_others():
    """Both answer the router. The decode worker serves the other model on, and the model goes to another worker."""

    async def scenario():
        health = {"failures": 3, "warm_up_attempts": 2, "interval_seconds": 0.1}
        async with rig(decode=2, health=health) as r:
            math, cut_off = r.prefill["math"][0], r.decode[0]
            cut_off.unreachable.add(math.engine_id)
            answers = await asyncio.gather(*(r.complete() for _ in range(8)))
            assert [answer.json()["choices"][0]["text"] for answer in answers] == [expected("math", "a b c d", 4)] * 8
            refused = cut_off.started
            await until(lambda: cut_off.started > refused + 8)  # warm-ups that fail, again and again
            state = state_of(r, cut_off)
            assert (state.state, state.breaker.state) == ("ready", "closed")
            assert state_of(r, math).breaker.state == "closed"
            assert (math.url, cut_off.url) not in r.state.fleet.warm
            r.forget()
            for _ in range(4):
                assert (await r.complete("code")).json()["choices"][0]["text"] == expected("code", "a b c d", 4)
            assert any(body["prompt"] == "a b c d" for body in cut_off.seen)
            cut_off.unreachable.clear()
            await r.ready()

    run(scenario)


def test_a_pair_that_hangs_lets_the_others_have_a_turn():
    async def scenario():
        health = {"warm_up_seconds": 0.5, "warm_up_attempts": 50, "warm_up_at_once": 1}
        async with rig(decode=1, ready=False, prepare=hanging, health=health) as r:
            await until(lambda: "code" not in r.state.fleet.without_a_pair(), seconds=8)

    run(scenario)


def test_the_pairs_of_a_worker_that_hangs_take_turns_with_those_of_others():
    async def scenario():
        async with rig(decode=12, health={"warm_up_seconds": 0.5, "warm_up_at_once": 1}) as r:
            (math,), (code,) = r.prefill["math"], r.prefill["code"]
            for worker, first_seconds in ((math, 60.0), (code, 0.0)):
                await worker.kill()
                await until(lambda worker=worker: state_of(r, worker).state == "down")
                worker.first_seconds = first_seconds
                await worker.restart()
                await until(lambda worker=worker: state_of(r, worker).state == "ready")
            await until(lambda: r.state.health._turns.waiting > 8)
            hung = math.started
            await until(lambda: "code" not in r.state.fleet.without_a_pair())
            assert math.started <= hung + 2

    run(scenario)


def test_a_pair_that_left_while_it_waited_for_its_turn_is_not_asked():
    async def scenario():
        health = {"warm_up_seconds": 1.0, "warm_up_attempts": 1, "warm_up_at_once": 1}
        async with rig(decode=1, health=health) as r:
            (math,), (code,) = r.prefill["math"], r.prefill["code"]
            source, target = state_of(r, code), state_of(r, r.decode[0])
            math.first_seconds = 60.0
            r.state.health.require_warm_up(state_of(r, math), target)
            await until(lambda: math.started == 1)
            r.state.health.require_warm_up(source, target)
            await until(lambda: (source, target) in r.state.health._warm_ups)
            del r.prefill["code"]
            r.apply()
            await until(lambda: (source, target) not in r.state.health._warm_ups)
            assert code.started == 0
            await code.stop()

    run(scenario)


def test_a_health_check_has_the_time_that_the_file_says_whatever_the_clients_own_is():
    async def scenario():
        async with rig(models=("math",), decode=1) as r, httpx.AsyncClient(trust_env=False, timeout=0.1) as impatient:
            r.decode[0].check_seconds = 0.3
            assert await identity_fault(impatient, state_of(r, r.decode[0])) is None

    run(scenario)


def test_check_gives_up_on_a_worker_that_hangs():
    async def scenario():
        async with rig(models=("math",), decode=1) as r:
            r.decode[0].check_seconds = 60.0
            found = await asyncio.wait_for(check_workers(r.cluster(health={"timeout_seconds": 0.5}), r.names), 10)
            faults = {worker["url"]: worker["fault"] for worker in found["workers"]}
            assert faults[r.prefill["math"][0].url] is None
            assert faults[r.decode[0].url] == "does not answer within 0.5 seconds"
            r.decode[0].check_seconds = 0.0

    run(scenario)
