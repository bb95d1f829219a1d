"""The in-process engine: continuous batching over the seam, one decode batch for requests of every prefill module.

A step is: let requests in, read some prompt tokens, decode one token for every running row. It is synchronous and knows
no threads; engine_thread.py runs it.
"""

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from qsun.engine.fair_queue import FairQueue
from qsun.engine.generation import GenerateConfig, check_tokens, eos_tokens
from qsun.engine.prefilling import LoadedModule, Prefilling, PrefillTask
from qsun.engine.prefix_cache import PrefixCache
from qsun.engine.requests import Full, Refused, Request, TokenLogprob, Update
from qsun.engine.rows import Row, Running
from qsun.engine.slot_cache import kv_bytes_per_token
from qsun.engine.snapshot import model_states
from qsun.engine.state import EngineState, EngineWatch
from qsun.errors import QsunError
from qsun.memory import available_bytes
from qsun.model.locate import load_tokenizer
from qsun.runtime.decode_module import DecodeModule
from qsun.runtime.prefill_module import PrefillModule
from qsun.runtime.row_text import RowText

_SHARED = ""


@dataclass(frozen=True)
class EngineConfig:
    """Limits of the engine.

    Attributes:
        max_batch: requests that prefill or decode at a time.
        kv_bytes: of the decode batch's KV; 0: a quarter of what is free on its device when the engine is made, so load
            prefill modules before. KV of prompts that are being read lies beside it, at most as much again.
        prefix_bytes: of the prefix cache; 0: none.
        prefill_tokens: prompt tokens read between two decode steps.
        max_waiting: requests in the queues; one more is refused.
        partitioned: decode each model's requests in a batch of their own, in turns: conventional serving, to compare.
        static: fixed shapes of a decode step, as CUDA graphs need; None: on a GPU.
    """

    max_batch: int = 64
    kv_bytes: int = 0
    prefix_bytes: int = 256 << 20
    prefill_tokens: int = 512
    max_waiting: int = 256
    partitioned: bool = False
    static: bool | None = None

    def __post_init__(self) -> None:
        for name, low in (("max_batch", 1), ("kv_bytes", 0), ("prefix_bytes", 0), ("prefill_tokens", 1)):
            if getattr(self, name) < low:
                raise QsunError(f"{name} {getattr(self, name)} is out of range; use {low} or more")
        if self.max_waiting < 1:
            raise QsunError(f"max_waiting {self.max_waiting} is out of range; use 1 or more")


class Engine:
    """Serves the requests of many prefill modules from one decode module.

    Args:
        decode: the shared decode module. watch: told what happens, for metrics.

    Attributes:
        modules: prefill modules by name. positions, dtype: of the decode model. budget_tokens: of KV.
        state: what the last step left, for other threads to read.
    """

    def __init__(self, decode: DecodeModule, config: EngineConfig | None = None, watch: EngineWatch | None = None):
        self.decode, self.config, self.watch = decode, config or EngineConfig(), watch or EngineWatch()
        model: Any = decode.model
        self.tokenizer = load_tokenizer(decode.directory)
        self.eos = eos_tokens(decode, GenerateConfig())
        self.positions: int = model.config.max_position_embeddings
        self.dtype: torch.dtype = model.model.embed_tokens.weight.dtype
        per_token = kv_bytes_per_token(model.config, self.dtype)
        free = available_bytes(model.model.embed_tokens.weight.device)
        self.budget_tokens = (self.config.kv_bytes or free // 4) // per_token
        if self.budget_tokens < 2:
            raise QsunError(f"kv_bytes {self.config.kv_bytes} holds no request; a token takes {per_token} bytes")
        self.modules: dict[str, LoadedModule] = {}
        self.known = PrefixCache(self.config.prefix_bytes)
        self._queue, self._prefilling = FairQueue(), Prefilling(self.known, self.config.prefill_tokens)
        self._batches: dict[str, Running] = {}
        self._loads = 0
        self._finished_at: deque[float] = deque(maxlen=64)
        self._started = time.monotonic()
        self.state = EngineState()

    # --- prefill modules ----------------------------------------------------------------------------------------------

    def add_module(self, name: str, module: PrefillModule) -> None:
        """Serve a prefill module under a name; its pair with the decode module was checked when it was loaded."""
        if name in self.modules:
            raise QsunError(f"model {name!r} is served already; remove it first, or choose another name")
        self._loads += 1
        self.modules[name] = LoadedModule(name, module, self._loads)
        self._publish()

    def remove_module(self, name: str) -> None:
        """Take no more requests for a model; it goes once those that it has are done."""
        self._module(name).leaving = True
        self._let_go()
        self._publish()

    def _module(self, name: str) -> LoadedModule:
        found = self.modules.get(name)
        if found is None:
            raise Refused(f"model {name!r} is not served; models are {', '.join(self.modules) or '(none)'}")
        if found.leaving:
            raise Refused(f"model {name!r} is being removed")
        return found

    def _let_go(self) -> None:
        for name, owner in list(self.modules.items()):
            if owner.leaving and not owner.active:
                del self.modules[name]
                self._batches.pop(name, None)
                self._queue.forget(name)
                self.known.forget(owner.number)

    # --- requests -----------------------------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raise what `submit` would, but for a full queue."""
        self._module(request.model)
        check_tokens(request.tokens, self.decode, request.sampling.max_new_tokens, "the prompt")
        if request.sampling.stop and self.tokenizer is None:
            raise QsunError("the model has no tokenizer; leave stop strings out")
        budget = self._batch(request.model).batch.cache.budget_tokens
        if request.kv_tokens > budget:
            raise QsunError(
                f"the prompt's {len(request.tokens)} tokens and max_tokens {request.sampling.max_new_tokens} need KV "
                f"of {request.kv_tokens} tokens, and the engine has {budget}; ask for fewer"
            )

    def submit(self, *requests: Request) -> None:
        """Queue requests, all or none.

        Raises:
            Refused: a model that is not served. Full: no room at present. QsunError: what can never be served.
        """
        for request in requests:
            self.check(request)
        most, waiting = self.config.max_waiting, len(self._queue)
        if len(requests) > most:
            raise QsunError(f"{len(requests)} answers are asked for at once, and the queue holds {most}; ask for fewer")
        if waiting + len(requests) > most:
            self.watch.refused(requests)
            raise Full(f"{waiting} requests are waiting, and the limit is {most}; try again later")
        for request in requests:
            self.modules[request.model].active += 1
            self._queue.add(request, {owner.request.model for owner in self._in_progress()})
        self._publish()

    def cancel(self, request: str) -> None:
        """Give a request up wherever it is, and free what it holds; one that is gone already is no error."""
        if self._drop(request) is not None:
            self._let_go()
            self._publish()

    def fail(self, request: str) -> None:
        """Count a request as failed; the engine steps no more."""
        self._drop(request, "error")

    def _drop(self, request: str, outcome: str = "cancelled") -> Request | None:
        for waiting in self._queue:
            if waiting.id == request:
                self._queue.take(waiting)
                return self._gone(waiting, outcome, 0)
        task = self._prefilling.drop(request)
        if task is not None:
            return self._gone(task.request, outcome, 0)
        for running in self._batches.values():
            for row in running.rows:
                if row.request.id == request:
                    running.remove(row)
                    return self._gone(row.request, outcome, row.count)
        return None

    def _gone(self, request: Request, outcome: str, tokens: int) -> Request:
        now = time.monotonic()
        self.modules[request.model].active -= 1
        self._finished_at.append(now)
        self.watch.finished(request, outcome, tokens, now - request.arrived)
        return request

    def _in_progress(self) -> list[Row | PrefillTask]:
        rows: list[Row | PrefillTask] = [row for running in self._batches.values() for row in running.rows]
        return rows + list(self._prefilling.tasks)

    @property
    def idle(self) -> bool:
        return not len(self._queue) and not self._in_progress()

    # --- a step -------------------------------------------------------------------------------------------------------

    def step(self) -> list[Update]:
        """Do the next bit of everybody's work. Returns what came of it."""
        updates = self._expire()
        self._admit()
        self._prefill()
        updates += self._decode()
        self._let_go()
        self._publish()
        return updates

    def _expire(self) -> list[Update]:
        now = time.monotonic()
        everything = [*self._queue, *(item.request for item in self._in_progress())]
        late = [request for request in everything if now - request.arrived > request.seconds]
        for request in late:
            self._drop(request.id, "timeout")
        return [Update(r.id, finish="timeout", error=f"not done within {r.seconds:g} seconds") for r in late]

    def _admit(self) -> None:
        while (request := self._queue.next()) is not None:
            waiting = [task.request for task in self._prefilling.tasks]
            batch = self._batch(request.model)
            if len(self._in_progress()) >= self.config.max_batch:
                return
            alike = [r for r in waiting if self._batch(r.model) is batch]
            if not batch.batch.cache.fits([r.kv_tokens for r in [*alike, request]]):
                return
            self._queue.take(request)
            self._queue.charge(request.model, request.prefix_tokens)
            self._prefilling.tasks.append(PrefillTask(request, self.modules[request.model]))
            self.watch.admitted(request, time.monotonic() - request.arrived)

    def _batch(self, model: str) -> Running:
        name = model if self.config.partitioned else _SHARED
        if name not in self._batches:
            share = self.budget_tokens // (len(self.modules) if self.config.partitioned else 1)
            self._batches[name] = Running(self.decode.model, share, self.config.static)
        return self._batches[name]

    def _prefill(self) -> None:
        if not self._prefilling.tasks:
            return
        started = time.monotonic()
        finished, tokens = self._prefilling.turn()
        for task in finished:
            text = None if self.tokenizer is None else RowText(self.tokenizer, task.request.sampling.stop)
            self._batch(task.request.model).add(Row(task.request, task.owner, text, task.cached), task.layers)
        self.watch.prefilled(tokens, time.monotonic() - started)

    def _decode(self) -> list[Update]:
        updates = []
        for running in self._batches.values():
            if running.rows:
                started = time.monotonic()
                chosen = running.step()
                now = time.monotonic()
                self.watch.step(len(chosen), now - started)
                updates += [self._update(running, *one, now) for one in chosen]
        return updates

    def _update(
        self, running: Running, row: Row, token: int | None, logprob: TokenLogprob | None, now: float
    ) -> Update:
        request = row.request
        if token is None:
            running.remove(row, broken=True)
            self._gone(request, "error", row.count - 1)
            return Update(request.id, finish="error", error="the model computed NaN or Inf for this prompt")
        self._queue.charge(request.model, 1)
        self.watch.token(request, row.count, now - request.arrived)
        ends = token in self.eos and not request.sampling.ignore_eos
        stopped = row.text is not None and not ends and row.text.add(token)
        last = row.count == request.sampling.max_new_tokens
        finish = "eos" if ends else "stop" if stopped else "length" if last else ""
        text = "" if row.text is None else row.text.rest(stopped) if finish else row.text.fresh()
        if finish:
            running.remove(row)
            self._gone(request, finish, row.count)
        cached = row.cached if row.count == 1 else 0
        return Update(request.id, (token,), text, finish, "", () if logprob is None else (logprob,), cached)

    def _publish(self) -> None:
        models = model_states(self.modules.values(), self._queue.waiting, self._in_progress())
        done = list(self._finished_at)
        span = time.monotonic() - (done[0] if len(done) == self._finished_at.maxlen else self._started)
        self.state = EngineState(
            models,
            self.budget_tokens,
            self.known.bytes,
            self.known.hits,
            self.known.lookups,
            len(done) / max(span, 1e-3),
        )
