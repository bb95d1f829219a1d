"""What a simulated decode worker holds: rows that step together, prompts to read, waiting requests, and their KV."""

import heapq
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass

from qsun.eval.simulate.curves import Curves
from qsun.eval.simulate.result import RequestTimes


class RowBatch:
    """Rows that step together. It keeps the sum and the maximum of their contexts, and a heap of their ends, so that a
    step needs no loop over rows.
    """

    def __init__(self) -> None:
        self.rows = self.context = self._step = self._count = 0
        self._ends: list[tuple[int, int, RequestTimes]] = []
        self._longest: list[tuple[int, int]] = []  # (-context at step 0, step of its end), as a heap
        self._joined: list[RequestTimes] = []

    def join(self, times: RequestTimes) -> None:
        prompt, end = times.request.prompt_tokens, self._step + times.request.output_tokens
        self.rows += 1
        self.context += prompt
        self._count += 1
        heapq.heappush(self._ends, (end, self._count, times))
        heapq.heappush(self._longest, (self._step - prompt, end))
        self._joined.append(times)

    def longest(self) -> int:
        """Return the longest context of the rows; there must be one."""
        while self._longest[0][1] <= self._step:
            heapq.heappop(self._longest)
        return self._step - self._longest[0][0]

    def advance(self, now: float) -> list[RequestTimes]:
        """End a step, in which every row got a token. Returns the rows that are complete."""
        self._step += 1
        self.context += self.rows
        for times in self._joined:
            times.first = now
        self._joined.clear()
        ended = []
        while self._ends and self._ends[0][0] == self._step:
            times = heapq.heappop(self._ends)[2]
            times.last = now
            self.rows -= 1
            self.context -= kv_tokens(times)
            ended.append(times)
        return ended


@dataclass
class _QueuedPrompt:
    times: RequestTimes
    done: int = 0

    @property
    def left(self) -> int:
        return self.times.request.prompt_tokens - 1 - self.done


class PromptQueue:
    """Prompts that a decode worker reads between its steps, as qsun's in-process engine does.

    Whole prompts of the first one's model that fit into the turn are read side by side in one pass, padded to the
    longest. A longer prompt is read in pieces, with others between them.
    """

    def __init__(self, turn_tokens: int, curves: Curves):
        self._turn_tokens, self._curves = turn_tokens, curves
        self._prompts: deque[_QueuedPrompt] = deque()

    def add(self, times: RequestTimes) -> None:
        self._prompts.append(_QueuedPrompt(times))

    def __len__(self) -> int:
        return len(self._prompts)

    def turn(self) -> tuple[list[RequestTimes], float]:
        """Read up to `turn_tokens`. Returns the requests whose prompt is complete, which it removes, and seconds."""
        finished: list[RequestTimes] = []
        left, seconds = self._turn_tokens, 0.0
        while self._prompts and left > 0:
            head = self._prompts[0]
            if head.left > left and left < self._turn_tokens:
                break
            group = self._group(left) or [head]
            longest = max(prompt.left for prompt in group)
            tokens = min(left, longest)
            alone = len(group) == 1
            seconds += self._curves.chunk(tokens, head.done) if alone else self._curves.side_by_side(len(group), tokens)
            left -= len(group) * tokens
            for prompt in group:
                prompt.done += min(tokens, prompt.left)
            complete = [prompt for prompt in group if not prompt.left]
            for prompt in complete:
                self._prompts.remove(prompt)
            finished += [prompt.times for prompt in complete]
            if not complete:
                self._prompts.rotate(-1)
        return finished, seconds

    def _group(self, most: int) -> list[_QueuedPrompt]:
        """Return the first prompt and those after it that can be read beside it."""
        head = self._prompts[0]
        group: list[_QueuedPrompt] = []
        longest = 0
        for prompt in self._prompts:
            if prompt.times.request.model != head.times.request.model:
                continue
            if prompt.done or (len(group) + 1) * max(longest, prompt.left) > most:
                if prompt is head:
                    return []
                continue
            group.append(prompt)
            longest = max(longest, prompt.left)
        return group


class AdmissionQueue:
    """Requests that wait for a decode worker, admitted in order of arrival or fairly.

    Fair: the model that was served the fewest tokens is next, as in the in-process engine. Prompts count when they are
    admitted, output as it is produced. A model that returns starts level with the least served of the models that have
    requests here or, without any, with the most served.
    """

    def __init__(self, models: tuple[str, ...], fair: bool):
        self._queues: dict[str, deque[tuple[int, RequestTimes]]] = {model: deque() for model in models}
        self._fair, self._count = fair, 0
        self._served = dict.fromkeys(models, 0)
        self._most = 0

    def add(self, times: RequestTimes, held: Mapping[str, int]) -> None:
        """Add a request. held: admitted requests of each model."""
        model = times.request.model
        if not held[model] and not self._queues[model]:
            others = [self._served[m] for m, queue in self._queues.items() if m != model and (held[m] or queue)]
            self._served[model] = max(self._served[model], min(others, default=self._most))
        self._count += 1
        self._queues[model].append((self._count, times))

    def next(self) -> RequestTimes | None:
        """Return the next request; it stays in the queue until `take`."""
        key = self._served.__getitem__ if self._fair else lambda model: self._queues[model][0][0]
        model = min((model for model, queue in self._queues.items() if queue), key=key, default=None)
        return None if model is None else self._queues[model][0][1]

    def take(self, times: RequestTimes) -> None:
        """Remove the request that `next` returned."""
        self._queues[times.request.model].popleft()
        self.charge(times.request.model, times.request.prompt_tokens - 1)

    def charge(self, model: str, tokens: int) -> None:
        """Count tokens that a model was served."""
        self._served[model] += tokens
        self._most = max(self._most, self._served[model])


class KvBudget:
    """KV of a decode worker's rows, including those whose prompt is being read.

    Args:
        limit: tokens; None for no limit. batches: how many share it equally.
        rectangle: each row takes what the longest one needs, as in the in-process engine; else its prompt and output.
    """

    def __init__(self, limit: int | None, rectangle: bool, batches: int):
        self._limit = limit if limit is None else limit // batches
        self._rectangle = rectangle
        self._needs: dict[str, list[int]] = defaultdict(list)

    def fits(self, batch: str, times: RequestTimes) -> bool:
        if self._limit is None:
            return True
        needs = [*self._needs[batch], self._need(times)]
        return (len(needs) * max(needs) if self._rectangle else sum(needs)) <= self._limit

    def take(self, batch: str, times: RequestTimes) -> None:
        if self._limit is not None:
            self._needs[batch].append(self._need(times))

    def give(self, batch: str, times: RequestTimes) -> None:
        if self._limit is not None:
            self._needs[batch].remove(self._need(times))

    def _need(self, times: RequestTimes) -> int:
        """Return tokens of one request; the engine never feeds the last one."""
        return kv_tokens(times) - self._rectangle


def kv_tokens(times: RequestTimes) -> int:
    """Return the tokens of KV that a request takes from its admission to its end."""
    return times.request.prompt_tokens + times.request.output_tokens
