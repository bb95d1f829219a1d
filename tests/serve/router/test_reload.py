"""What a reload changes, and that a faulty file changes nothing."""

import asyncio
import json
import logging

import pytest

from qsun.serve.router.process import RouterProcess
from tests.serve.routing import rig, run, until


class NoModules:
    """In place of ModuleChecks: the names that it is given."""

    def __init__(self, names):
        self._names = names

    def names(self, cluster):
        return self._names


@pytest.mark.parametrize("key", ["short", "with a space in it"])
def test_a_reload_with_a_faulty_key_changes_nothing_and_says_so(tmp_path, caplog, key):
    async def scenario():
        async with rig(models=("math",), decode=2) as r:
            process = RouterProcess(tmp_path / "cluster.yaml", r.cluster(), r.names, NoModules(r.names))
            process.router = r.router
            r.router.apply(r.cluster(), r.names, ("the-old-key",))
            workers, old = list(r.state.fleet), r.state.cluster
            (tmp_path / "keys").write_text(key)
            values = {
                "listen": {"api_keys": "keys"},
                "decode": {"module": "demo", "workers": [r.decode[0].url]},
                "models": {"math": {"module": "demo", "workers": [r.prefill["math"][0].url]}},
                "limits": {"concurrent_requests": 7},
            }
            (tmp_path / "cluster.yaml").write_text(json.dumps(values))
            with caplog.at_level(logging.ERROR):
                await process.reload()
            assert "is not applied; keeping the old file: an API key of" in caplog.text
            assert await r.metric("qsun_router_reloads_total", outcome="refused") == 1
            assert list(r.state.fleet) == workers
            assert r.state.cluster is old
            assert r.state.admission.most_running == 256
            headers = {"Authorization": "Bearer the-old-key"}
            assert (await r.client.get("/v1/models", headers=headers)).status_code == 200

    run(scenario)


def test_a_model_that_is_removed_while_its_request_waits_for_a_worker_is_not_served():
    async def scenario():
        async with rig(limits={"no_worker_seconds": 3600.0}) as r:
            gone = r.prefill.pop("math")[0]
            await gone.kill()
            task = asyncio.create_task(r.complete("math"))
            await until(lambda: r.state.admission.running == 1 and not task.done())
            await until(lambda: r.state.fleet.without_a_pair() == ["math"])
            r.apply()
            answer = await task
            assert answer.status_code == 404
            assert answer.json()["error"]["param"] == "model"
            assert await r.metric("qsun_router_requests_total", model="math", outcome="404") == 1

    run(scenario)


def test_more_places_let_in_whoever_waits_for_one():
    async def scenario():
        limits = {"concurrent_requests": 1, "queue_seconds": 3600}
        async with rig(models=("math",), limits=limits) as r, r.state.admission.permit():
            task = asyncio.create_task(r.complete())
            await until(lambda: r.state.admission.waiting == 1)
            r.apply(limits={"concurrent_requests": 2})
            assert (await task).status_code == 200
            await until(lambda: r.state.admission.running == 1)
            r.apply(limits={"concurrent_requests": 1, "queued_requests": 0})
            assert (await r.complete()).status_code == 429

    run(scenario)


def test_more_handshakes_at_once_let_in_the_pairs_that_wait():
    async def scenario():
        def slow(worker):
            worker.first_seconds = 60.0 if worker.role == "prefill" else 0.0

        models, health = ("a", "b", "c", "d"), {"warm_up_at_once": 1, "warm_up_attempts": 1, "warm_up_seconds": 20.0}
        async with rig(models=models, decode=1, ready=False, prepare=slow, health=health) as r:

            def asked():
                return sum(pool[0].started for pool in r.prefill.values())

            await until(lambda: asked() == 1 and len(r.state.health._warm_ups) == 4)
            await asyncio.sleep(0.3)
            assert asked() == 1
            r.apply(health=r.settings["health"] | {"warm_up_at_once": 3})
            await until(lambda: asked() == 3, seconds=5)
            await asyncio.sleep(0.3)
            assert asked() == 3

    run(scenario)
