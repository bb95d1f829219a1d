"""Prompts that their prefill modules are reading, a bounded number of tokens between two decode steps."""

from collections import deque
from collections.abc import Iterator, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from qsun.adapters.adapter_module import AdapterModule
from qsun.adapters.adapter_weights import AdapterWeights
from qsun.adapters.pool import AdapterPool
from qsun.engine.config import EngineConfig
from qsun.engine.prefix_cache import LayerKV, PrefixCache
from qsun.engine.requests import Request, TokenLogprob
from qsun.engine.token_choice import token_logprobs
from qsun.runtime.logits import head_logits, position_pieces, prompt_hidden
from qsun.runtime.prefill_module import PrefillModule
from qsun.runtime.rotary import rope_boundary
from qsun.runtime.seam import extend_prefill, prefilled_rows


@dataclass(eq=False)
class LoadedModule:
    """A prefill module that requests can name.

    Attributes:
        number: of this load; no other load of any module has it.
        leaving: takes no new requests. active: requests that are waiting, prefilling or decoding.
    """

    name: str
    module: PrefillModule
    number: int
    leaving: bool = False
    active: int = 0

    @property
    def adapts(self) -> bool:
        """Whether it is an adapter."""
        return isinstance(self.module, AdapterModule) and self.module.state is not None


@dataclass(eq=False)
class PrefillTask:
    """A prompt on its way into KV.

    Attributes:
        adapter: of the owner, if it is one. done: tokens read. cached: of them, found in the prefix cache.
        layers: KV of all of them, once they are read.
        scores: log-probabilities of the prompt's tokens from the second on, where they are wanted.
    """

    request: Request
    owner: LoadedModule
    adapter: AdapterWeights | None = None
    done: int = 0
    cached: int = 0
    started: bool = False
    layers: LayerKV = field(default_factory=list)
    scores: list[TokenLogprob] = field(default_factory=list)
    cache: Any = None

    @property
    def left(self) -> int:
        """Tokens to read."""
        return self.request.prefix_tokens - self.done

    @property
    def unscored(self) -> int:
        """Tokens to score once all are read."""
        wanted = self.request.sampling.prompt_logprobs is not None
        return self.request.prefix_tokens - len(self.scores) if wanted else 0


class Prefilling:
    """The prompts being read, and the turn that reads on. Padding counts in all numbers of tokens.

    Args:
        decode: the decode module's causal LM, which scores prompts. known: prefix cache.
        adapters: those in memory. limits: prefill_tokens, most that a turn reads; pass_tokens, that a pass does.

    Attributes:
        read: tokens read in this turn.
    """

    def __init__(self, decode: Any, known: PrefixCache, adapters: AdapterPool, limits: EngineConfig):
        self._decode, self._adapters = decode, adapters
        self.known, self.turn_tokens, self.pass_tokens = known, limits.prefill_tokens, limits.pass_tokens
        self.tasks: deque[PrefillTask] = deque()
        self.read = 0

    def begin(
        self, request: Request, owner: LoadedModule, wanted: Set[int], modules: Sequence[LoadedModule]
    ) -> set[str]:
        """Take a prompt in, or return the models whose prompts have to wait, if its adapter is not in memory.

        Where it finds no place, those of other adapters wait too, as its model has been served the least; but not of
        one that was loaded for a request that waits: it keeps its place until that request has begun.

        wanted: numbers of the modules for which requests wait.
        """
        adapter = None
        if isinstance(owner.module, AdapterModule) and owner.adapts:
            pinned = {task.owner.number for task in self.tasks} | self._adapters.unused & wanted
            adapter = self._adapters.want(owner.number, owner.module.load, pinned)
        if isinstance(adapter, str):
            others = modules if adapter == "no_room" else ()
            return {owner.name, *(m.name for m in others if m.adapts and m.number not in self._adapters.unused)}
        self.tasks.append(PrefillTask(request, owner, adapter))
        return set()

    @torch.no_grad()
    def turn(self) -> Iterator[PrefillTask]:
        """Read on; yield each task as it is finished and taken out.

        Short prompts of one module, or of adapters that share weights, are read side by side; one that is longer than
        a turn takes its turns between those of others, so that none of them waits for all of it.
        """
        self.read = 0
        while self.tasks and self.read < self.turn_tokens:
            head, left = self.tasks[0], self.turn_tokens - self.read
            self._start(head)
            if head.left > left < self.turn_tokens:
                return
            group = self._group(min(left, self.pass_tokens))
            if len(group) > 1:
                self.read += self._read_together(group)
            elif head.left or not head.unscored:
                self.read += self._read_on(head, min(left, head.left, self.pass_tokens))
            else:
                if head.cache is not None:  # the whole prompt was known, so no pass has read any of it
                    self._keep(head)
                self.read += self._score(head, min(left, head.unscored, self.pass_tokens))
            for task in [task for task in group or [head] if not task.left]:
                self._keep(task)
                if not task.unscored:
                    self.tasks.remove(task)
                    yield task
            if self.tasks and self.tasks[0] is head:
                self.tasks.rotate(-1)

    def drop(self, request: str) -> PrefillTask | None:
        """Take out a request that is not finished."""
        task = next((task for task in self.tasks if task.request.id == request), None)
        if task is not None:
            self.tasks.remove(task)
        return task

    def _start(self, task: PrefillTask) -> None:
        if task.started:
            return
        task.started = True
        wanted = task.request.tokens[:-1]
        task.done, layers = self.known.find(task.owner.number, wanted, self._variant(task))
        task.cached = task.done
        if task.done:
            task.cache = DynamicCache()
            for index, (keys, values) in enumerate(layers):
                task.cache.update(keys[None], values[None], index)

    def _group(self, most: int) -> list[PrefillTask]:
        """Return the head and those that can be read beside it: whole, not begun, of its weights, within `most`."""
        head = self.tasks[0]
        group: list[PrefillTask] = []
        longest = 0
        for task in self.tasks:
            if task.owner.module.model is not head.owner.module.model:
                continue
            self._start(task)
            padded = (len(group) + 1) * max(longest, task.left)
            if task.done or padded > most:
                if task is head:
                    return []
                continue
            group.append(task)
            longest = max(longest, task.left)
        return sorted(group, key=lambda task: (task.adapter is not None, task.owner.number))  # see SharedPrefill.rows

    def _read_together(self, group: Sequence[PrefillTask]) -> int:
        """Return the tokens computed."""
        prompts = [list(task.request.tokens[:-1]) for task in group]
        with _adapters_of(group):
            written = prefilled_rows(group[0].owner.module.model, prompts, self.pass_tokens)
            for task, layers in zip(group, written, strict=True):
                task.layers, task.done = layers, task.request.prefix_tokens
        return len(group) * max(map(len, prompts))

    def _read_on(self, task: PrefillTask, count: int) -> int:
        if count:
            model = task.owner.module.model
            task.cache = task.cache or DynamicCache()
            piece = list(task.request.tokens[task.done : task.done + count])
            tokens = torch.tensor([piece], device=model.model.embed_tokens.weight.device)
            with _adapters_of([task]):
                extend_prefill(model, tokens, task.done, task.cache, [task.request.prefix_tokens])
            task.done += count
        return count

    def _score(self, task: PrefillTask, count: int) -> int:
        """Score the next tokens of a prompt that is read. Returns the tokens computed."""
        first, tokens = len(task.scores), task.request.tokens
        hidden = prompt_hidden(self._decode, tokens, task.layers, first, first + count)
        top = task.request.sampling.prompt_logprobs or 0
        following = torch.tensor(tokens[first + 1 : first + 1 + count], device=hidden.device)
        for piece in position_pieces(count, self._decode.config.vocab_size):
            logits = head_logits(self._decode, hidden[piece])
            task.scores += token_logprobs(logits, following[piece], [top] * len(logits))
        return count

    def _keep(self, task: PrefillTask) -> None:
        """Turn what was read into layers of one row, for the decode batch and the prefix cache."""
        if task.cache is not None:
            task.layers = [(layer.keys[0], layer.values[0]) for layer in task.cache.layers]
            task.cache = None
        elif task.scores:
            return  # it was kept before it was scored
        if task.layers:
            self.known.keep(task.owner.number, task.request.tokens[:-1], task.layers, self._variant(task))

    def _variant(self, task: PrefillTask) -> int:
        """Prompts whose KV differs from the first token on: those that are long for a model with longrope."""
        boundary = rope_boundary(self._decode.config)
        return int(boundary is not None and task.request.prefix_tokens > boundary)


def _adapters_of(tasks: Sequence[PrefillTask]) -> AbstractContextManager[None]:
    """Within, a pass over the prompts of these tasks, which share weights, has their adapters."""
    module = tasks[0].owner.module
    return module.shared.rows([t.adapter for t in tasks]) if isinstance(module, AdapterModule) else nullcontext()
