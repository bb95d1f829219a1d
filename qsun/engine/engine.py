"""The in-process engine: continuous batching over the seam, one decode batch for requests of every prefill module.

A step is: let requests in, read some prompt tokens, decode one token for every running row. It is synchronous and knows
no threads; `thread.py` runs it in one, `generation.py` in a loop.
"""

import time
from collections import deque

import torch

from qsun.adapters.pool import NOT_LOADED, AdapterPool
from qsun.engine.config import EngineConfig, check_steps
from qsun.engine.decode.decode_step import on_device
from qsun.engine.decode.slot_memory import available_after_release
from qsun.engine.decode_batch import DecodeBatch
from qsun.engine.fair_queue import FairQueue
from qsun.engine.prefilling import LoadedModule, Prefilling, PrefillTask
from qsun.engine.prefix_cache import PrefixCache
from qsun.engine.requests import Full, Refused, Request, Update, check_prompt, most_new_tokens
from qsun.engine.row import DecodeRow, decoding_row
from qsun.engine.state import EngineState, EngineWatch, engine_state, model_states
from qsun.engine.token_choice import ChosenToken
from qsun.errors import QsunError
from qsun.runtime.decode_module import DecodeModule
from qsun.runtime.kv_cache import kv_bytes_per_token
from qsun.runtime.prefill_module import PrefillModule

_SHARED = ""
_LOADING_SECONDS = 0.05  # that an engine with nothing else to do waits for an adapter in one step


class Engine:
    """Serves the requests of many prefill modules from one decode module.

    Args:
        decode: the shared decode module. watch: receives events, for metrics.

    Attributes:
        modules: prefill modules by name. positions, dtype: of the decode model. budget_tokens: of KV.
        eos: tokens that end a row; the decode module's own unless they are replaced. adapters: those in memory.
    """

    def __init__(self, decode: DecodeModule, config: EngineConfig | None = None, watch: EngineWatch | None = None):
        self.decode, self.config, self.watch = decode, config or EngineConfig(), watch or EngineWatch()
        model = decode.model
        self.tokenizer, self.eos = decode.tokenizer, decode.eos_tokens
        self.positions: int = model.config.max_position_embeddings
        self.dtype: torch.dtype = model.model.embed_tokens.weight.dtype
        self.device: torch.device = model.model.embed_tokens.weight.device
        check_steps(self.config, self.device)
        per_token = kv_bytes_per_token(model.config, self.dtype, self.config.kv_dtype)
        self.budget_tokens = (self.config.kv_bytes or available_after_release(self.device) // 4) // per_token
        if self.budget_tokens < 1:
            raise QsunError(f"kv_bytes {self.config.kv_bytes} is too small; one token takes {per_token} bytes")
        self.modules: dict[str, LoadedModule] = {}
        self.known = PrefixCache(self.config.prefix_bytes)
        self._queue = FairQueue()
        self.adapters = AdapterPool(self.config.max_adapters)
        self._prefilling = Prefilling(model, self.known, self.adapters, self.config)
        self._batches: dict[str, DecodeBatch] = {}
        self._loads = 0
        self._deadline = float("inf")  # no request's is earlier
        self._finished_at: deque[float] = deque(maxlen=64)
        self._started = time.monotonic()

    # --- prefill modules ----------------------------------------------------------------------------------------------

    def add_module(self, name: str, module: PrefillModule) -> None:
        """Serve a prefill module under a name; its pair with the decode module was checked when it was loaded."""
        if name in self.modules:
            raise QsunError(f"model {name!r} is already served; remove it first, or choose another name")
        self._loads += 1
        self.modules[name] = LoadedModule(name, module, self._loads)

    def remove_module(self, name: str) -> None:
        """Take no more requests for a model; remove it once those that it has are done."""
        self._module(name).leaving = True
        self._let_go()

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
                self.watch.removed(name)
                self._batches.pop(name, None)
                self._queue.forget(name)
                self.known.forget(owner.number)
                self.adapters.drop(owner.number)

    # --- requests -----------------------------------------------------------------------------------------------------

    def check(self, request: Request, name: str = "the prompt") -> None:
        """Raise what `submit` would, but for a full queue."""
        self._module(request.model)
        check_prompt(request, self.decode.model.config, name)
        if request.sampling.stop and self.tokenizer is None:
            raise QsunError("the model has no tokenizer; leave stop strings out")
        budget = self.batch_of(request.model).cache.budget_tokens - self.config.speculate
        if request.kv_tokens > budget:
            raise QsunError(
                f"the prompt's {len(request.tokens)} tokens and max_tokens {request.sampling.max_new_tokens} need KV "
                f"of {request.kv_tokens} tokens, and the engine has {budget}; ask for fewer"
            )

    def room(self, prompt_tokens: int) -> int:
        """Return the most new tokens that a prompt of this length can have; 0 or less where it does not fit."""
        return most_new_tokens(self.decode.model.config, self._share - self.config.speculate, prompt_tokens)

    @property
    def _share(self) -> int:
        """The KV tokens of a decode batch."""
        return self.budget_tokens // (len(self.modules) if self.config.partitioned else 1)

    def submit(self, *requests: Request) -> None:
        """Queue requests, all or none.

        Raises:
            Refused: a model that is not served. Full: no room at present. QsunError: a request that is never possible.
        """
        for request in requests:
            self.check(request)
        most, waiting = self.config.max_waiting, len(self._queue)
        if len(requests) > most:
            raise QsunError(f"{len(requests)} answers are requested at once, and the queue holds {most}; ask for fewer")
        if waiting + len(requests) > most:
            self.watch.refused(requests)
            raise Full(f"{waiting} requests are waiting, and the limit is {most}; try again later")
        busy = {owner.request.model for owner in self._in_progress()}
        for request in requests:
            self.modules[request.model].active += 1
            self._queue.add(request, busy)
            self._deadline = min(self._deadline, request.deadline)

    def cancel(self, request: str) -> None:
        """Give up a request wherever it is, and free what it holds; one that has ended already is ignored."""
        if self._drop(request) is not None:
            self._let_go()

    def fail(self, request: str) -> None:
        """Count a request as failed; the engine steps no more."""
        self._drop(request, "error")

    def _drop(self, request: str, outcome: str = "cancelled") -> Request | None:
        for waiting in self._queue:
            if waiting.id == request:
                self._queue.take(waiting)
                return self._ended(waiting, outcome, 0)
        task = self._prefilling.drop(request)
        if task is not None:
            return self._ended(task.request, outcome, 0)
        for batch in self._batches.values():
            for row in batch.rows:
                if row.request.id == request:
                    batch.remove(row)
                    return self._ended(row.request, outcome, row.count)
        return None

    def _ended(self, request: Request, outcome: str, tokens: int) -> Request:
        now = time.monotonic()
        self.modules[request.model].active -= 1
        self._finished_at.append(now)
        self.watch.finished(request, outcome, tokens, now - request.arrived)
        return request

    def _rows(self) -> list[DecodeRow]:
        return [row for batch in self._batches.values() for row in batch.rows]

    def _in_progress(self) -> list[DecodeRow | PrefillTask]:
        return [*self._rows(), *self._prefilling.tasks]

    @property
    def state(self) -> EngineState:
        """A snapshot. Other threads may ask for it: it reads copies of what a step may change meanwhile."""
        batches = list(self._batches.values())
        rows = [row for batch in batches for row in list(batch.rows)]
        models = model_states(list(self.modules.values()), self._queue.waiting, list(self._prefilling.tasks), rows)
        done = list(self._finished_at)
        span = time.monotonic() - (done[0] if len(done) == self._finished_at.maxlen else self._started)
        rate = len(done) / max(span, 1e-3)
        return engine_state(models, self.budget_tokens, self.known, self.adapters, batches, rate)

    @property
    def idle(self) -> bool:
        return not len(self._queue) and not self._in_progress()

    # --- a step -------------------------------------------------------------------------------------------------------

    def step(self) -> list[Update]:
        """Advance every request a little. Returns what came of it."""
        with on_device(self.device):
            if not self._in_progress():
                self.adapters.wait(_LOADING_SECONDS)
            updates = self._expire() + self._without_adapter()
            self._admit()
            updates += self._prefill() + self._decode()
            self._let_go()
            return updates

    def _expire(self) -> list[Update]:
        now = time.monotonic()
        if now <= self._deadline:
            return []
        everything = [*self._queue, *(item.request for item in self._in_progress())]
        late = [request for request in everything if now > request.deadline]
        for request in late:
            self._drop(request.id, "timeout")
        self._deadline = min((r.deadline for r in everything if r not in late), default=float("inf"))
        return [Update(r.id, finish="timeout", error=f"not done within {r.seconds:g} seconds") for r in late]

    def _without_adapter(self) -> list[Update]:
        """End the requests whose adapter could not be loaded; why is in the log, as it may name paths."""
        failed = self.adapters.collect()
        waiting = [(request.id, self.modules[request.model].number) for request in self._queue] if failed else []
        lost = [request for request, number in waiting if number in failed]
        for request in lost:
            self._drop(request, "error")
        return [Update(request, finish="error", error=NOT_LOADED) for request in lost]

    def _admit(self) -> None:
        room = self.config.max_batch - len(self._in_progress())
        needs: dict[DecodeBatch, list[int]] = {}
        for task in self._prefilling.tasks:
            needs.setdefault(self.batch_of(task.request.model), []).append(task.request.kv_tokens)
        modules = list(self.modules.values()) if len(self._queue) else []
        absent: set[str] = set()  # models whose adapter is not in memory
        wanted = {owner.number for owner in modules if self._queue.waiting(owner.name)}
        while room > 0 and (request := self._queue.next(absent)) is not None:
            batch, owner = self.batch_of(request.model), self.modules[request.model]
            if not batch.cache.fits([*needs.get(batch, ()), request.kv_tokens]):
                break
            missing = self._prefilling.begin(request, owner, wanted, modules)
            if missing:
                absent |= missing
                continue
            needs.setdefault(batch, []).append(request.kv_tokens)
            room -= 1
            self._queue.take(request)
            self._queue.charge(request.model, request.prefix_tokens)
            self.watch.admitted(request, time.monotonic() - request.arrived)
        for batch, alike in needs.items():
            batch.cache.reserve(alike)

    def batch_of(self, model: str) -> DecodeBatch:
        name = model if self.config.partitioned else _SHARED
        if name not in self._batches:
            self._batches[name] = DecodeBatch(self.decode.model, self._share, *self.config.of_batches)
        return self._batches[name]

    def _prefill(self) -> list[Update]:
        if not self._prefilling.tasks:
            return []
        started, updates = time.monotonic(), []
        for task in self._prefilling.turn():
            request = task.request
            if not request.sampling.max_new_tokens:  # its prompt was to be scored, no more
                self._ended(request, "length", 0)
                scores = tuple(task.scores)
                updates += [Update(request.id, finish="length", cached_tokens=task.cached, prompt_logprobs=scores)]
                continue
            row = decoding_row(request, task.cached, tuple(task.scores), self.tokenizer, self.config.speculate)
            self.batch_of(request.model).add(row, task.layers)
        self.watch.prefilled(self._prefilling.read, time.monotonic() - started)
        return updates

    def _decode(self) -> list[Update]:
        updates = []
        for batch in self._batches.values():
            if not batch.rows:
                continue
            started, rows = time.monotonic(), len(batch.rows)
            for chosen in batch.turns(self.eos):
                now = time.monotonic()
                updates += [self._update(row, choice, now) for row, choice in chosen]
            self.watch.step(rows, now - started)
            batch.remove_ended()
        return updates

    def _update(self, row: DecodeRow, choice: ChosenToken, now: float) -> Update:
        request = row.request
        if choice.error:
            row.finish = "error"
            self._ended(request, "error", row.count - 1)
            return Update(request.id, finish="error", error=choice.error)
        self._queue.charge(request.model, 1)
        self.watch.token(request, row.count, now - request.arrived)
        text, row.finish = row.show(self.eos)
        if row.finish:
            self._ended(request, row.finish, row.count)
        logprobs = () if choice.logprob is None else (choice.logprob,)
        cached, scores = (row.cached, row.prompt_logprobs) if row.count == 1 else (0, ())
        return Update(request.id, (choice.token,), text, row.finish, "", logprobs, cached, scores)
