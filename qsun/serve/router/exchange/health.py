"""Background checks: whether each worker answers, serves its module, and can exchange KV cache with each other one.

A worker is used once it answers /health and lists the served name of its module at /v1/models. A pair is used once it
is warm, which means that it has answered a tiny request together: the first handshake of two NIXL agents has a limit of
5 seconds and may fail, and a user's request must not be the one to find out. The same request is the probe that closes
a circuit, and that tells a worker that hangs from one that is only slow.
"""

import asyncio
import contextlib
import logging
import random
import sys
import uuid
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

import httpx

from qsun.serve.cluster.schema import Health
from qsun.serve.http.wire import BrokenStream
from qsun.serve.router.exchange.admission import Admission
from qsun.serve.router.exchange.identity import identity_fault
from qsun.serve.router.exchange.request import COMPLETIONS, RoutedRequest
from qsun.serve.router.exchange.transfer import decode_body
from qsun.serve.router.exchange.worker_answers import checked_tokens
from qsun.serve.router.exchange.worker_http import (
    RequestRefused,
    WorkerFailed,
    cause_of,
    opened,
    prefill,
    read_json,
    time_to_answer,
)
from qsun.serve.router.workers.fleet import Fleet
from qsun.serve.router.workers.worker import State, Worker

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_OWN_FAULT = ("connect", "timeout", "broken", "status_5xx", "no_transfer")
_TRANSFER_FAULT = ("broken", "status_5xx")  # of a decode worker: the KV cache may not have come
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
    """One task for each worker. Requests report here how workers treat them."""

    def __init__(self, client: httpx.AsyncClient, fleet: Fleet, config: Health):
        self._client, self._fleet = client, fleet
        self._tasks: dict[Worker, asyncio.Task[None]] = {}
        self._wake: dict[Worker, asyncio.Event] = {}
        self._warm_ups: dict[tuple[Worker, Worker], asyncio.Task[None]] = {}
        self._turns = Admission(config.warm_up_at_once, most_waiting=sys.maxsize)
        self.configure(config)

    def configure(self, config: Health) -> None:
        """Use other settings from now on, also for warm-ups that wait for their turn."""
        self.config = config
        self._turns.limit(config.warm_up_at_once, most_waiting=sys.maxsize)

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
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def report_success(self, worker: Worker, engine_id: str | None = None) -> None:
        """A request succeeded at a worker. An unknown engine is a new process, whose pairs are cold."""
        worker.breaker.succeed()
        worker.suspected = False
        if engine_id is not None and engine_id not in worker.engine_ids:
            if worker.engine_ids:
                logger.info("%s worker %s is a new process: its pairs warm up again", worker.role, worker.url)
                self._fleet.forget_pairs(worker)
                self._wake_up([worker])
            worker.engine_ids.add(engine_id)

    def report_failure(self, failed: WorkerFailed, first: bool = True) -> None:
        """A request failed at a worker.

        A timeout makes the worker a suspect: it may hang, or be sound and slow, and a probe decides. If a decode worker
        may have failed to get a KV cache, the pair is cold until it has warmed up again; further failures of a pair
        that is cold already are not counted, as they may be the fault of the network between the two.

        Args:
            first: of this request at this worker; its further ones are not counted, as the request may be the cause.
        """
        worker, source = failed.worker, failed.source
        if failed.cause == "timeout":
            worker.suspected = True
            self._wake_up([worker])
        elif source is None or failed.cause not in _TRANSFER_FAULT:
            if first:
                self._count(failed)
        else:
            if first and self._is_warm((source, worker)):
                self._count(failed)
            self.require_warm_up(source, worker)

    def require_warm_up(self, source: Worker, target: Worker) -> None:
        """Mark a pair as cold, and warm it up again."""
        self._fleet.warm.discard((source.url, target.url))
        self._wake_up([source, target])

    def _count(self, failed: WorkerFailed) -> None:
        """Count a failure against a worker's circuit."""
        worker = failed.worker
        if failed.cause == "wrong_worker":
            self._set(worker, "refused", str(failed))
        elif failed.cause in _OWN_FAULT and worker.breaker.fail():
            logger.warning("circuit of %s worker %s is open: %s", worker.role, worker.url, failed)
            self._set(worker, "down", str(failed))
        self._wake_up([worker])

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
            pause = self.config.interval_seconds * random.uniform(0.8, 1.2)  # so that checks spread out
            if worker.breaker.state == "open":
                pause = min(pause, worker.breaker.cool_down_seconds)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await wake.wait()

    async def _check(self, worker: Worker) -> None:
        lacking = worker.lacking
        try:
            async with asyncio.timeout(self.config.timeout_seconds):
                wrong = await identity_fault(self._client, worker)
        except TimeoutError:
            self._count(
                WorkerFailed(worker, "timeout", f"health check: no answer in {self.config.timeout_seconds:g} s")
            )
            self._wake[worker].clear()
            return
        except httpx.HTTPError as error:
            self._count(WorkerFailed(worker, cause_of(error), f"health check: {type(error).__name__}"))
            if isinstance(error, httpx.ConnectError):  # nothing listens: more failures would tell nothing new
                self._set(worker, "down", "connection refused")
            self._wake[worker].clear()
            return
        if wrong:
            self._set(worker, "refused", wrong)
            return
        if worker.lacking != lacking:
            missing = ", ".join(sorted(worker.lacking)) or "none"
            logger.log(
                logging.WARNING if worker.lacking else logging.INFO,
                "%s worker %s lacks the adapters of: %s",
                worker.role,
                worker.url,
                missing,
            )
            self._fleet.changed()
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
            self._fleet.forget_pairs(worker)
            worker.engine_ids.clear()
            worker.suspected = False
        self._fleet.changed()

    def _warm_up_pairs(self, worker: Worker) -> None:
        for partner in self._fleet.partners(worker):
            pair = (worker, partner) if worker.role == "prefill" else (partner, worker)
            if self._needs_warm_up(pair) and pair not in self._warm_ups:
                task = self._warm_ups[pair] = asyncio.create_task(self._warm_up(*pair))
                task.add_done_callback(lambda _, pair=pair: self._warm_ups.pop(pair, None))  # type: ignore[misc]

    def _is_warm(self, pair: tuple[Worker, Worker]) -> bool:
        return (pair[0].url, pair[1].url) in self._fleet.warm

    def _needs_warm_up(self, pair: tuple[Worker, Worker]) -> bool:
        """Return whether a pair is cold, or needs a probe because of a circuit or a suspicion, and can be asked."""
        sound = all(worker.breaker.state == "closed" and not worker.suspected for worker in pair)
        return not (sound and self._is_warm(pair)) and _may_warm(pair)

    async def _warm_up(self, source: Worker, target: Worker) -> None:
        """Send requests through a pair until one succeeds. Retries are expected: the first handshake may time out."""
        failed: WorkerFailed | None = None
        pair = source, target
        attempts = 1 if self._is_warm(pair) else self.config.warm_up_attempts  # a probe of a pair that worked is clear
        for attempt in range(attempts):
            if attempt:
                await asyncio.sleep(min(0.1 * 2 ** (attempt - 1), 2.0))
            # for one attempt only, and shared fairly: a prefill worker that hangs lets others have a turn
            async with self._turns.permit(source.url):
                if not self._needs_warm_up(pair):
                    return
                epochs = source.epoch, target.epoch
                failed = await self._try_pair(source, target)
            if epochs != (source.epoch, target.epoch):
                failed = None  # a process may have been replaced, so this attempt says nothing about the next one
            elif failed is None and _may_warm(pair):
                logger.info("pair %s and %s is warm", source.url, target.url)
                self._fleet.warm.add((source.url, target.url))
                self._fleet.changed()
                return
        if failed is not None:
            self._warm_up_failed(pair, failed)

    def _warm_up_failed(self, pair: tuple[Worker, Worker], failed: WorkerFailed) -> None:
        source, target = pair
        logger.warning("pair %s and %s is not warm: %s", source.url, target.url, failed)
        self._fleet.warm.discard((source.url, target.url))
        worker = failed.worker
        if worker.suspected and failed.cause == "timeout":
            worker.breaker.trip()  # it does not even answer a tiny request
            self._set(worker, "down", str(failed))
        elif worker is source or not any(url == target.url for _, url in self._fleet.warm):
            self._count(failed)  # else it works with other prefill workers, and the network to this one may be at fault

    async def _try_pair(self, source: Worker, target: Worker) -> WorkerFailed | None:
        request_id = f"warm-up.{uuid.uuid4().hex[:8]}"
        seconds = self.config.warm_up_seconds
        try:
            params = None
            if source is not target:
                asked = prefill(self._client, source, _WARM_UP, source.served_name, request_id, seconds)
                filled = await _within(seconds, source, asked)
                self.report_success(source, filled.engine_id)
                params = filled.params
            body = decode_body(_WARM_UP, target.served_name, source.served_name, params, 1)
            await _within(seconds, target, self._decode(target, body, request_id, seconds))
        except WorkerFailed as failed:
            return failed
        self.report_success(target)
        return None

    async def _decode(self, target: Worker, body: dict[str, Any], request_id: str, seconds: float) -> None:
        async with opened(self._client, target, COMPLETIONS, body, request_id, time_to_answer(seconds)) as response:
            answer = await read_json(target, response)
        try:
            checked_tokens(answer)
        except BrokenStream as broken:
            raise WorkerFailed(target, "broken", str(broken)) from None


async def _within(seconds: float, worker: Worker, asked: Coroutine[Any, Any, _T]) -> _T:
    """Await one half of a warm-up. A timeout or refusal is the fault of the worker that was asked, not of the other."""
    try:
        async with asyncio.timeout(seconds):
            return await asked
    except TimeoutError:
        raise WorkerFailed(worker, "timeout", f"warm-up: no answer in {seconds:g} seconds") from None
    except RequestRefused as refused:
        raise WorkerFailed(worker, "status_5xx", f"warm-up: {refused} {refused.body[:200]!r}") from None


def _may_warm(pair: tuple[Worker, Worker]) -> bool:
    return all(w.state == "ready" and not w.leaving and w.breaker.state != "open" for w in pair)
