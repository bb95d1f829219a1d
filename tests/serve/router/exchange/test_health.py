"""Which workers and pairs are used: identity, first handshakes, the circuit breaker, workers that join and leave."""

import asyncio

from tests.serve.fake_vllm import FakeWorker
from tests.serve.routing import expected, rig, run, until


def state_of(r, fake):
    return next(worker for worker in r.state.fleet if worker.url == fake.url)


def test_a_pair_is_used_only_after_its_handshake():
    async def scenario():
        def failing(worker):
            worker.handshakes_to_fail = 3 if worker.role == "decode" else 0

        async with rig(prepare=failing) as r:  # 4 pairs, each of which misses its first 3 handshakes
            for _ in range(8):
                for model in ("math", "code"):
                    assert (await r.complete(model)).json()["choices"][0]["text"] == expected(model, "a b c d", 4)
            assert await r.metric("qsun_router_retries_total") == 0  # no request had to find out

    run(scenario)


def test_a_pair_that_never_gets_warm_is_not_used_and_the_others_are():
    async def scenario():
        async with rig(models=("math",), health=NO_PATIENCE) as r:
            await r.decode[0].kill()
            await until(lambda: state_of(r, r.decode[0]).state == "down")
            r.decode[0].handshakes_to_fail = 10**6
            await r.decode[0].restart()
            await until(lambda: r.decode[0].started > 3)
            r.forget()
            for _ in range(4):
                assert (await r.complete()).status_code == 200
            assert not any(body["prompt"] == "a b c d" for body in r.decode[0].seen)
            assert (await r.client.get("/ready")).status_code == 200  # one decode worker is enough

    run(scenario)


NO_PATIENCE = {"interval_seconds": 0.1, "warm_up_attempts": 2, "cool_down_seconds": 0.2}


def test_a_worker_with_another_module_is_refused_until_it_has_the_right_one():
    async def scenario():
        def wrong(worker):
            worker.served_name = "qsun-ffff" if worker.role == "decode" else worker.served_name

        async with rig(models=("math",), ready=False, prepare=wrong) as r:
            await until(lambda: all(w.state == "refused" for w in r.state.fleet.decode))
            assert "it serves qsun-ffff and not qsun-decode" in state_of(r, r.decode[0]).reason
            for worker in r.decode:
                worker.served_name = "qsun-decode"
            await r.ready()
            assert (await r.complete()).status_code == 200

    run(scenario)


def test_the_circuit_opens_after_failures_in_a_row_and_closes_after_a_probe():
    async def scenario():
        health = {"interval_seconds": 0.1, "failures": 2, "cool_down_seconds": 0.5}
        limits = {"no_worker_seconds": 10.0, "attempts": 2}
        async with rig(models=("math",), decode=1, health=health, limits=limits) as r:
            prefill = r.prefill["math"][0]
            prefill.statuses = [500] * 3
            worker = state_of(r, prefill)
            assert (await r.complete()).status_code == 502
            assert worker.breaker.state == "closed"  # both attempts are one failure: the request may be the cause
            task = asyncio.create_task(r.complete())
            await until(lambda: worker.breaker.state == "open")
            assert await r.metric("qsun_router_circuit_open", busy=True, role="prefill") == 1
            assert not worker.usable
            answer = await task  # it waits for the probe, which succeeds
            assert answer.json()["choices"][0]["text"] == expected("math", "a b c d", 4)
            assert worker.breaker.state == "closed"

    run(scenario)


def test_a_worker_that_comes_back_shakes_hands_again_before_it_is_used():
    async def scenario():
        async with rig(models=("math",), decode=2) as r:
            back = r.decode[0]
            await back.kill()
            await until(lambda: state_of(r, back).state == "down")
            assert not any(back.url in pair for pair in r.state.fleet.warm)
            back.handshakes_to_fail = 1
            r.forget()
            await back.restart()
            await r.ready()
            assert [body["prompt"] for body in back.seen] == [[1, 1, 1, 1]] * 2
            for _ in range(4):
                assert (await r.complete()).status_code == 200
            assert back.started > 2

    run(scenario)


def test_a_prefill_worker_whose_process_was_replaced_between_two_checks_is_noticed():
    """Its engine id is new: the decode workers do not know it yet, and their first handshake may fail."""

    async def scenario():
        health = {"interval_seconds": 60.0}
        async with rig(models=("math",), decode=1, health=health, limits={"no_worker_seconds": 10.0}) as r:
            r.decode[0].handshakes_to_fail = 1
            r.prefill["math"][0].engine_id = "another process"
            r.decode[0].handshakes.clear()
            assert (await r.complete()).json()["choices"][0]["text"] == expected("math", "a b c d", 4)
            prompts = [body["prompt"] for body in r.decode[0].seen]
            assert prompts == [[1, 1, 1, 1], [1, 1, 1, 1], "a b c d"]

    run(scenario)


def test_workers_join_and_leave_under_load():
    async def scenario():
        async with rig(decode=2, prepare=lambda w: setattr(w, "token_seconds", 0.005)) as r:
            leaving, staying = r.decode
            joining = FakeWorker("decode", "decode", "qsun-decode", r.network)
            await joining.start()
            wanted = [(("math", "code")[i % 2], f"prompt {i}") for i in range(60)]
            tasks = [asyncio.create_task(r.complete(m, p, max_tokens=20)) for m, p in wanted[:30]]
            await until(lambda: leaving.started > 3)
            state = state_of(r, leaving)
            r.decode[:] = [staying, joining]
            r.apply()
            sent = state.taken
            tasks += [asyncio.create_task(r.complete(m, p, max_tokens=20)) for m, p in wanted[30:]]
            for (model, prompt), task in zip(wanted, tasks, strict=True):
                answer = await task
                assert answer.status_code == 200
                assert answer.json()["choices"][0]["text"] == expected(model, prompt, 20)
            assert state.taken == sent  # nothing new, and what it had is finished
            assert leaving.finished == leaving.started == sent
            await r.ready()
            for number in range(4):
                assert (await r.complete(prompt=f"later {number}")).status_code == 200
            assert joining.finished > 2
            assert await r.metric("qsun_router_retries_total") == 0
            await leaving.stop()

    run(scenario)


def test_partitioned_keeps_a_decode_worker_for_one_model():
    async def scenario():
        async with rig(policy="partitioned") as r:
            for _ in range(4):
                for model in ("math", "code"):
                    assert (await r.complete(model)).status_code == 200
            salts = [{body["cache_salt"] for body in worker.seen} for worker in r.decode]
            assert salts == [{"qsun-math"}, {"qsun-code"}]

    run(scenario)
