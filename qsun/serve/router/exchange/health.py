"""Is each worker there, is it the one that it should be, and has each pair shaken hands? Asked in the background.

A worker is used once it answers /health and lists the served name of its module under /v1/models. A pair is used once
it has answered a tiny request together: the first handshake of two NIXL agents has 5 seconds and may miss them, and a
user's request must not be the one to find out. The same request is the probe that closes a circuit.
"""

import asyncio
import contextlib
import logging
import math
import random
import sys
import uuid
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

import httpx

from qsun.serve.cluster.schema import Health
from qsun.serve.http.admission import Admission
from qsun.serve.http.cancellation import end
from qsun.serve.router.exchange.request import COMPLETIONS, RoutedRequest
from qsun.serve.router.exchange.transfer import decode_body
from qsun.serve.router.exchange.worker_answers import failure_in
from qsun.serve.router.exchange.worker_http import RequestRefused, WorkerFailed, cause_of, opened, prefill, read_json
from qsun.serve.router.workers.fleet import Fleet
from qsun.serve.router.workers.worker import State, Worker

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_OWN_FAULT = ("connect", "timeout", "broken", "status_5xx", "no_transfer")
_CHECKS_APART_SECONDS = 0.1  # at least, however often requests fail
_WARM_UP = RoutedRequest(
    path=COMPLETIONS,
    model="warm-up",
    body={"prompt": [1, 1, 1, 1], "max_tokens": 1, "temperature": 0.0},
    stream=False,
    include_usage=False,
    max_tokens=1,
    prompt_tokens=4,
)


class HealthChecks:
    """One task a worker; `blame`, `praise` and `doubt` take in what requests find out."""

    def __init__(self, client: httpx.AsyncClient, fleet: Fleet, config: Health):
        self._client, self._fleet = client, fleet
        self._tasks: dict[Worker, asyncio.Task[None]] = {}
        self._wake: dict[Worker, asyncio.Event] = {}
        self._warm_ups: dict[tuple[Worker, Worker], asyncio.Task[None]] = {}
        self._turns = Admission(config.warm_up_at_once, most_waiting=sys.maxsize, wait_seconds=math.inf)
        self.take(config)

    def take(self, config: Health) -> None:
        """Go by other settings from now on, for the handshakes that wait for their turn, too."""
        self.config = config
        self._turns.bound(config.warm_up_at_once, most_waiting=sys.maxsize, wait_seconds=math.inf)

    def watch(self) -> None:
        """Start tasks for workers that joined, end those of workers that left."""
        current = set(self._fleet)
        for worker in [worker for worker in self._tasks if worker not in current]:
            self._tasks.pop(worker).cancel()
            self._wake.pop(worker)
        for worker in current - set(self._tasks):
            self._wake[worker] = asyncio.Event()
            self._tasks[worker] = asyncio.create_task(self._watch(worker))

    async def stop(self) -> None:
        tasks = [*self._tasks.values(), *self._warm_ups.values()]
        self._tasks.clear()
        await end(tasks)

    def praise(self, worker: Worker, engine_id: str | None = None) -> None:
        """A request succeeded there. Another engine than before is a new process: its pairs are cold."""
        worker.breaker.succeed()
        if engine_id is not None and engine_id not in worker.engine_ids:
            if worker.engine_ids:
                logger.info("%s worker %s is a new process: its pairs shake hands again", worker.role, worker.url)
                self._fleet.cool(worker)
                self._wake_up([worker])
            worker.engine_ids.add(engine_id)

    def blame(self, failed: WorkerFailed) -> None:
        """A request failed there."""
        worker = failed.worker
        if failed.cause == "wrong_worker":
            self._set(worker, "refused", str(failed))
        elif failed.cause in _OWN_FAULT and worker.breaker.fail():
            logger.warning("circuit of %s worker %s is open: %s", worker.role, worker.url, failed)
            self._set(worker, "down", str(failed))
        self._wake_up([worker])

    def doubt(self, prefill_worker: Worker, decode_worker: Worker) -> None:
        """A KV cache may not have come over: the pair has to shake hands again before it is used."""
        self._fleet.warm.discard((prefill_worker.url, decode_worker.url))
        self._wake_up([prefill_worker, decode_worker])

    def _wake_up(self, workers: Iterable[Worker]) -> None:
        for worker in workers:
            if worker in self._wake:
                self._wake[worker].set()

    async def _watch(self, worker: Worker) -> None:
        wake = self._wake[worker]
        while self._tasks.get(worker) is asyncio.current_task():
            wake.clear()
            if worker.breaker.state != "open":
                await self._check(worker)
            await asyncio.sleep(min(_CHECKS_APART_SECONDS, self.config.interval_seconds))
            pause = self.config.interval_seconds * random.uniform(0.8, 1.2)  # so that checks do not come in step
            if worker.breaker.state == "open":
                pause = min(pause, worker.breaker.cool_down_seconds)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await wake.wait()

    async def _check(self, worker: Worker) -> None:
        try:
            async with asyncio.timeout(self.config.timeout_seconds):
                wrong = await identity_fault(self._client, worker)
        except TimeoutError:
            self.blame(WorkerFailed(worker, "timeout", f"health check: no answer in {self.config.timeout_seconds:g} s"))
            self._wake[worker].clear()
            return
        except httpx.HTTPError as error:
            self.blame(WorkerFailed(worker, cause_of(error), f"health check: {type(error).__name__}"))
            if isinstance(error, httpx.ConnectError):  # nobody listens: no need to wait for more failures
                self._set(worker, "down", "connection refused")
            self._wake[worker].clear()
            return
        if wrong:
            self._set(worker, "refused", wrong)
            return
        self._set(worker, "ready", "")
        self._warm_up_pairs(worker)

    def _set(self, worker: Worker, state: State, reason: str) -> None:
        if (worker.state, worker.reason) == (state, reason):
            return
        if state != worker.state:
            log = logger.info if state == "ready" else logger.warning
            log("%s worker %s is %s%s", worker.role, worker.url, state, f": {reason}" if reason else "")
        worker.state, worker.reason = state, reason
        if state != "ready":
            self._fleet.cool(worker)
            worker.engine_ids.clear()
        self._fleet.changed()

    def _warm_up_pairs(self, worker: Worker) -> None:
        for partner in self._fleet.partners(worker):
            pair = (worker, partner) if worker.role == "prefill" else (partner, worker)
            # a probe is what closes a circuit, so a warm pair needs one too while one of its circuits is not closed
            settled = (pair[0].url, pair[1].url) in self._fleet.warm and all(w.breaker.state == "closed" for w in pair)
            if settled or pair in self._warm_ups or not _may_warm(pair):
                continue
            task = self._warm_ups[pair] = asyncio.create_task(self._warm_up(*pair))
            task.add_done_callback(lambda _, pair=pair: self._warm_ups.pop(pair, None))  # type: ignore[misc]

    async def _warm_up(self, source: Worker, target: Worker) -> None:
        """Requests through a pair until one succeeds. Retries are expected: the first handshake has 5 seconds."""
        failed: WorkerFailed | None = None
        for attempt in range(self.config.warm_up_attempts):
            if attempt:
                await asyncio.sleep(min(0.1 * 2 ** (attempt - 1), 2.0))
            async with self._turns.place():  # for one attempt only: a pair that hangs lets the others have a turn
                if not _may_warm((source, target)):
                    return
                epochs = source.epoch, target.epoch
                failed = await self._handshake_failure(source, target)
            if epochs != (source.epoch, target.epoch):
                failed = None  # one of the processes may be gone: what this attempt found out says nothing of the next
            elif failed is None and _may_warm((source, target)):
                logger.info("pair %s and %s is warm", source.url, target.url)
                self._fleet.warm.add((source.url, target.url))
                self._fleet.changed()
                return
        if failed is not None:
            logger.warning("pair %s and %s is not warm: %s", source.url, target.url, failed)
            self.blame(failed)

    async def _handshake_failure(self, source: Worker, target: Worker) -> WorkerFailed | None:
        request_id = f"warm-up.{uuid.uuid4().hex[:8]}"
        seconds = self.config.warm_up_seconds
        try:
            asked = prefill(self._client, source, _WARM_UP, request_id, seconds)
            filled = await _by(source, asked, seconds)
            self.praise(source, filled.engine_id)
            body = decode_body(_WARM_UP, target.served_name, source.served_name, filled.params, 1)
            await _by(target, self._decode(target, body, request_id, seconds), seconds)
        except WorkerFailed as failed:
            return failed
        self.praise(target)
        return None

    async def _decode(self, target: Worker, body: dict[str, Any], request_id: str, seconds: float) -> None:
        async with opened(self._client, target, COMPLETIONS, body, request_id, httpx.Timeout(seconds)) as response:
            failure = failure_in(await read_json(target, response))
        if failure:
            raise WorkerFailed(target, "broken", failure)


async def _by(worker: Worker, asked: Coroutine[Any, Any, _T], seconds: float) -> _T:
    """One half of a handshake: a hang or a refusal in it is the fault of the worker that was asked, not of its mate."""
    try:
        async with asyncio.timeout(seconds):
            return await asked
    except TimeoutError:
        raise WorkerFailed(worker, "timeout", f"warm-up: no answer in {seconds:g} seconds") from None
    except RequestRefused as refused:
        raise WorkerFailed(worker, "status_5xx", f"warm-up: {refused} {refused.body[:200]!r}") from None


def _may_warm(pair: tuple[Worker, Worker]) -> bool:
    return all(w.state == "ready" and not w.leaving and w.breaker.state != "open" for w in pair)


async def identity_fault(client: httpx.AsyncClient, worker: Worker) -> str | None:
    """Why a worker that answers must not be used; None where it is the one that it should be.

    The caller bounds the time: httpx's own timeouts, 5 seconds by default, might be over before the file's.
    """
    health = await client.get(worker.url + "/health", timeout=None)
    if health.status_code != 200:
        return f"/health answers {health.status_code}"
    listed = await client.get(worker.url + "/v1/models", timeout=None)
    if listed.status_code != 200:
        return f"/v1/models answers {listed.status_code}"
    try:
        cards = {str(card["id"]): card for card in listed.json()["data"]}
    except (ValueError, KeyError, TypeError):
        return "/v1/models is no list of models; is it vLLM?"
    card = cards.get(worker.served_name)
    if card is None:
        return (
            f"it serves {', '.join(cards)[:200] or 'nothing'} and not {worker.served_name}; start it with that module"
        )
    length = card.get("max_model_len")
    worker.max_model_len = length if isinstance(length, int) else None
    return None
