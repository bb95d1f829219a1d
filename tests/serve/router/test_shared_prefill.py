"""Models that are adapters: one pool of prefill workers serves them all, and no model gets another one's text."""

import asyncio

from tests.serve.routing import expected, name_of, rig, run, text_of, until

ADAPTERS = ("poem", "tool", "a/b")


def test_adapters_and_full_modules_answer_side_by_side():
    async def scenario():
        async with rig(models=("math",), prefill=2, adapters=ADAPTERS) as r:
            asked = [(model, f"q {n % 3} b c") for n in range(12) for model in ("math", *ADAPTERS)]
            answers = await asyncio.gather(*(r.complete(model, prompt) for model, prompt in asked))
            for (model, prompt), response in zip(asked, answers, strict=True):
                assert response.json()["choices"][0]["text"] == expected(model, prompt, 4)
                assert response.json()["model"] == model
            events = await r.stream("tool", max_tokens=6)
            assert text_of(events) == expected("tool", "a b c d", 6)
            for worker in r.shared:
                assert {body["model"] for body in worker.seen} == {name_of(model) for model in ADAPTERS}
            assert {body["model"] for body in r.prefill["math"][0].seen} == {name_of("math")}
            listed = [card["id"] for card in (await r.client.get("/v1/models")).json()["data"]]
            assert set(listed) == {"math", *ADAPTERS}
            # a pool's workers are probed and warmed up once, not once for each adapter
            assert len(r.state.fleet.warm) == (2 + 2) * 2
            workers = (await r.client.get("/ready")).json()["workers"]
            assert len(workers) == 6
            assert sum(worker["adapters"] == sorted(ADAPTERS) for worker in workers) == 2

    run(scenario)


def test_a_prefix_cache_of_a_decode_worker_keeps_adapters_apart():
    def prepare(worker):
        worker.prefix_caching = worker.role == "decode"

    async def scenario():
        async with rig(models=(), decode=1, adapters=ADAPTERS, prepare=prepare) as r:
            for model in ADAPTERS * 2:
                assert (await r.complete(model)).json()["choices"][0]["text"] == expected(model, "a b c d", 4)
            salts = {body["cache_salt"] for body in r.decode[0].seen}
            assert salts == {name_of(model) for model in ADAPTERS}

    run(scenario)


def test_a_worker_that_lacks_an_adapter_serves_the_others():
    def prepare(worker):
        worker.adapters.pop(name_of("tool"), None)

    async def scenario():
        async with rig(
            models=(), adapters=ADAPTERS, ready=False, prepare=prepare, limits={"no_worker_seconds": 0.5}
        ) as r:
            await until(lambda: r.state.fleet.without_a_pair() == ["tool"])
            assert (await r.complete("poem")).json()["choices"][0]["text"] == expected("poem", "a b c d", 4)
            refused = await r.complete("tool")
            assert refused.status_code == 503
            assert r.shared[0].started == len(r.shared[0].seen)
            assert name_of("tool") not in {body["model"] for body in r.shared[0].seen}
            state = (await r.client.get("/ready")).json()
            assert state["models_without_workers"] == ["tool"]
            assert [worker["lacking"] for worker in state["workers"] if worker["role"] == "prefill"] == [["tool"]]
            r.shared[0].adapters[name_of("tool")] = "weights of tool"  # vLLM can load one while it runs
            await until(lambda: not r.state.fleet.without_a_pair())
            assert (await r.complete("tool")).json()["choices"][0]["text"] == expected("tool", "a b c d", 4)

    run(scenario)


def test_an_adapter_that_a_reload_adds_is_used_once_the_workers_list_it():
    async def scenario():
        async with rig(models=(), adapters=("poem",), limits={"no_worker_seconds": 0.5}) as r:
            before = list(r.state.fleet)
            r.adapters.append("new")
            r.apply()
            assert list(r.state.fleet) == before  # they stay, with their warm pairs
            assert r.state.fleet.without_a_pair() == ["new"]
            assert (await r.complete("new")).status_code == 503
            assert (await r.complete("poem")).json()["choices"][0]["text"] == expected("poem", "a b c d", 4)
            r.shared[0].adapters[name_of("new")] = "weights of new"
            await until(lambda: not r.state.fleet.without_a_pair())
            assert (await r.complete("new")).json()["choices"][0]["text"] == expected("new", "a b c d", 4)
            r.adapters.remove("poem")
            r.apply()
            assert (await r.complete("poem")).status_code == 404

    run(scenario)


def test_a_reload_while_a_prompt_is_read_does_not_rename_its_kv_cache():
    async def scenario():
        async with rig(models=(), decode=1, adapters=("poem",)) as r:
            (known,) = r.state.fleet.prefill["poem"]
            r.shared[0].first_seconds = 0.5
            task = asyncio.create_task(r.complete("poem"))
            await until(lambda: r.shared[0].started == 1)
            known.serve_adapters({"poem": "qsun-newer"})
            assert (await task).json()["choices"][0]["text"] == expected("poem", "a b c d", 4)
            assert r.decode[0].seen[0]["cache_salt"] == name_of("poem")

    run(scenario)


def test_a_pool_on_other_weights_is_refused():
    def prepare(worker):
        worker.served_name = name_of("other") if worker.role == "prefill" else worker.served_name

    async def scenario():
        async with rig(models=(), adapters=ADAPTERS, ready=False, prepare=prepare) as r:
            await until(lambda: all(worker.state != "unchecked" for worker in r.state.fleet))
            (worker,) = r.state.fleet.prefill["poem"]
            assert worker.state == "refused"
            assert f"not {name_of('base')}" in worker.reason

    run(scenario)


def test_decode_workers_of_their_own_models():
    async def scenario():
        async with rig(models=("math",), decode=3, adapters=("poem", "tool"), policy="partitioned") as r:
            for model in ("math", "poem", "tool"):
                for _ in range(3):
                    assert (await r.complete(model)).json()["choices"][0]["text"] == expected(model, "a b c d", 4)
            served = [{body["cache_salt"] for body in worker.seen} for worker in r.decode]
            assert served == [{name_of("math")}, {name_of("poem")}, {name_of("tool")}]

    run(scenario)
