"""Prompts being read by their prefill modules, a bounded number of tokens between two decode steps."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from qsun.engine.prefix_cache import LayerKV, PrefixCache
from qsun.engine.requests import Request
from qsun.runtime.prefill_module import PrefillModule
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


@dataclass(eq=False)
class PrefillTask:
    """A prompt on its way into KV.

    Attributes:
        done: tokens read. cached: of them, found in the prefix cache. layers: KV of all of them, once finished.
    """

    request: Request
    owner: LoadedModule
    done: int = 0
    cached: int = 0
    started: bool = False
    layers: LayerKV = field(default_factory=list)
    cache: Any = None

    @property
    def left(self) -> int:
        return self.request.prefix_tokens - self.done


class Prefilling:
    """The prompts being read, and the turn that reads on.

    Args:
        known: prefix cache. turn_tokens: most tokens (padding included) that one turn reads.
    """

    def __init__(self, known: PrefixCache, turn_tokens: int):
        self.known, self.turn_tokens = known, turn_tokens
        self.tasks: deque[PrefillTask] = deque()

    @torch.no_grad()
    def turn(self) -> tuple[list[PrefillTask], int]:
        """Read on. Returns the tasks that are finished, taken out, and the tokens read.

        Short prompts of one module are read side by side; one that is longer than a turn takes its turns in between the
        others', so that nobody waits for all of it.
        """
        finished, left = [], self.turn_tokens
        while self.tasks:
            head = self.tasks[0]
            self._start(head)
            if head.left > left and left < self.turn_tokens:
                break
            group = self._group(left)
            if len(group) > 1:
                left -= self._read_together(group)
            else:
                left -= self._read_on(head, min(left, head.left))
            done = [task for task in group or [head] if not task.left]
            for task in done:
                self.tasks.remove(task)
                self._finish(task)
            finished += done
            if not done:
                self.tasks.rotate(-1)
            if left <= 0:
                break
        return finished, self.turn_tokens - left

    def drop(self, request: str) -> PrefillTask | None:
        """Take a request out, unfinished."""
        task = next((task for task in self.tasks if task.request.id == request), None)
        if task is not None:
            self.tasks.remove(task)
        return task

    def _start(self, task: PrefillTask) -> None:
        if task.started:
            return
        task.started = True
        wanted = task.request.tokens[:-1]
        task.done, layers = self.known.find(task.owner.number, wanted)
        task.cached = task.done
        if task.done:
            task.cache = DynamicCache()
            for index, (keys, values) in enumerate(layers):
                task.cache.update(keys[None], values[None], index)

    def _group(self, most: int) -> list[PrefillTask]:
        """The head and those after it that can be read beside it: whole, fresh, of its module, within the turn."""
        head = self.tasks[0]
        group: list[PrefillTask] = []
        longest = 0
        for task in self.tasks:
            if task.owner is not head.owner:
                continue
            self._start(task)
            padded = (len(group) + 1) * max(longest, task.left)
            if task.done or padded > most:
                if task is head:
                    return []
                continue
            group.append(task)
            longest = max(longest, task.left)
        return group

    def _read_together(self, group: Sequence[PrefillTask]) -> int:
        """Returns the tokens computed, padding included."""
        prompts = [list(task.request.tokens[:-1]) for task in group]
        written = prefilled_rows(group[0].owner.module.model, prompts, self.turn_tokens)
        for task, layers in zip(group, written, strict=True):
            task.layers, task.done = layers, task.request.prefix_tokens
        return len(group) * max(map(len, prompts))

    def _read_on(self, task: PrefillTask, count: int) -> int:
        if count:
            model: Any = task.owner.module.model
            task.cache = task.cache or DynamicCache()
            piece = list(task.request.tokens[task.done : task.done + count])
            tokens = torch.tensor([piece], device=model.model.embed_tokens.weight.device)
            extend_prefill(model, tokens, task.done, task.cache)
            task.done += count
        return count

    def _finish(self, task: PrefillTask) -> None:
        if task.cache is not None:
            task.layers = [(layer.keys[0], layer.values[0]) for layer in task.cache.layers]
            task.cache = None
        if task.layers:
            self.known.keep(task.owner.number, task.request.tokens[:-1], task.layers)
