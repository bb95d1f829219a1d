"""Training examples: read from sources, held out, and put in order."""

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qsun.data.examples import TokenExample, assistant_turns, pair_example, prompt_example, turn_example
from qsun.data.sources import converted_rows
from qsun.errors import QsunError

_BATCHES_SORTED_TOGETHER = 32
_PASS_POSITIONS = 64  # what a pass of its own costs on a CPU, in positions
_MOST_CUT = 256


def read_examples(
    sources: Sequence[str], tokenizer: Any, max_len: int, what: str = "training", needs_response: bool = True
) -> tuple[list[TokenExample], int]:
    """Read examples, of a chat one for every assistant turn; and count those that are longer than max_len.

    Args:
        sources: what `source_rows` reads.
        what: the role of the data in the command, for errors.
        needs_response: False: prompts without a response are examples too, with an empty one.
    Raises:
        QsunError: a source that cannot be used, or nothing left; names file and line.
    """

    def convert(row: Mapping[str, Any], where: str) -> Iterator[TokenExample]:
        if "messages" not in row and not {"prompt", "response"} <= row.keys():
            raise QsunError(f"{where}: needs 'messages', or 'prompt' and 'response'; it has {', '.join(row)}")
        waiting = not needs_response and _waits(row)
        if waiting:
            yield prompt_example(tokenizer, row, where, fixed_day=True)
        if "messages" not in row:
            if not waiting:
                yield pair_example(tokenizer, row, where)
            return
        if waiting and not any(message.get("role") == "assistant" for message in row["messages"][1:]):
            return
        for turn in assistant_turns(row, where):
            example = turn_example(tokenizer, row, turn, where)
            if example is None:
                raise QsunError(
                    f"{where}: the model's chat template renders the prompt of message {turn} differently once it is "
                    "answered; give 'prompt' and 'response' instead"
                )
            yield example

    found = [e for source in sources for e in converted_rows(source, what, convert, needs_response=needs_response)]
    examples = [e for e in found if len(e.prompt) + max(1, len(e.response)) <= max_len]
    if not examples:
        left_out = f": all {len(found)} are longer than max_len {max_len}" if found else ""
        raise QsunError(f"{what} data {', '.join(sources)} has no examples{left_out}")
    return examples, len(found) - len(examples)


def cut_by_length(examples: Sequence[TokenExample]) -> list[Sequence[TokenExample]]:
    """Cut examples into passes that compute the least: padding of each pass counts, and so does each pass."""
    ranked = sorted(examples, key=lambda e: len(e.prompt) + len(e.response))
    if len(ranked) > _MOST_CUT:
        return [ranked]
    best, cuts = [0], [0]  # of the first n examples: positions computed, and where the last pass begins
    for end in range(1, len(ranked) + 1):
        prompt = response = 0
        found = []
        for start in range(end - 1, -1, -1):
            prompt, response = max(prompt, len(ranked[start].prompt)), max(response, len(ranked[start].response))
            found.append((best[start] + (end - start) * (prompt - 1 + response) + _PASS_POSITIONS, start))
        cost, start = min(found)
        best.append(cost)
        cuts.append(start)
    passes: list[Sequence[TokenExample]] = []
    end = len(ranked)
    while end:
        passes.append(ranked[cuts[end] : end])
        end = cuts[end]
    return passes[::-1]


def _waits(row: Mapping[str, Any]) -> bool:
    """Whether a prompt, or the last message of a chat, has no response."""
    if "messages" not in row:
        return row.get("response") is None
    messages = row["messages"]
    plain = isinstance(messages, list) and bool(messages) and all(isinstance(message, dict) for message in messages)
    return plain and messages[-1].get("role") != "assistant"


def fingerprint(examples: Sequence[TokenExample]) -> str:
    """Return the SHA-256 of the tokens, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.prompt, example.response]).encode())
    return digest.hexdigest()


def hold_out(examples: list[TokenExample], fraction: float, seed: int) -> tuple[list[TokenExample], list[TokenExample]]:
    """Draw validation examples from the training data. All examples of one prompt stay on the same side.

    Returns:
        Training and validation examples.
    Raises:
        QsunError: too few different prompts.
    """
    prompts = sorted({example.prompt for example in examples})
    count = max(1, round(fraction * len(prompts)))
    if len(prompts) <= count or not fraction:
        raise QsunError(
            f"{len(prompts)} different prompts are too few to hold {fraction:.0%} of them out; give validation data"
        )
    chosen = set(random.Random(seed).sample(prompts, count))
    return [e for e in examples if e.prompt not in chosen], [e for e in examples if e.prompt in chosen]


def crosses(example: TokenExample, boundary: int | None) -> bool:
    """Whether the response would need RoPE factors for `boundary` tokens and for more; None: they never change.

    A response that is still missing has one token at least.
    """
    prefix = len(example.prompt) - 1
    return boundary is not None and prefix <= boundary < prefix + max(1, len(example.response))


def draw(examples: list[TokenExample], count: int, seed: int) -> list[TokenExample]:
    """Draw `count` examples, in their order; all of them if there are no more, or if count is 0."""
    if not count or len(examples) <= count:
        return examples
    return [examples[i] for i in sorted(random.Random(seed).sample(range(len(examples)), count))]


class Batches:
    """The examples of each step. They depend on seed and epoch only, so a run can be resumed.

    Args:
        grouped: examples of like length come together, so that little of a batch is padding: those of some batches,
            drawn at random, are sorted by length and cut into batches, whose order is random again.
    """

    def __init__(self, examples: Sequence[TokenExample], size: int, seed: int, grouped: bool = False):
        self.examples, self.size, self.seed, self.grouped = examples, size, seed, grouped
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def of_step(self, step: int) -> list[TokenExample]:
        epoch, place = divmod(step, -(-len(self.examples) // self.size))
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._batches(epoch)
        return [self.examples[i] for i in self._epoch[1][place]]

    def _batches(self, epoch: int) -> list[list[int]]:
        draws = random.Random(f"{self.seed} {epoch}")
        order = list(range(len(self.examples)))
        draws.shuffle(order)
        if self.grouped:
            drawn = self.size * _BATCHES_SORTED_TOGETHER
            groups = [order[first : first + drawn] for first in range(0, len(order), drawn)]
            order = [i for group in groups for i in sorted(group, key=self._length)]
        batches = [order[first : first + self.size] for first in range(0, len(order), self.size)]
        if self.grouped:
            draws.shuffle(batches)
        return batches

    def _length(self, number: int) -> int:
        example = self.examples[number]
        return len(example.prompt) + len(example.response)


def token_count(examples: Sequence[TokenExample]) -> int:
    """Return the tokens that are read of these examples: all but each one's last."""
    return sum(len(e.prompt) + len(e.response) - 1 for e in examples)


def pieces(examples: Sequence[TokenExample], share: int, shares: int, count: int) -> Iterator[Sequence[TokenExample]]:
    """Cut one of so many equal shares of a batch into pieces of like lengths.

    Every share has as many pieces, some of them empty; together they hold each example once.
    """
    mine = sorted(examples[share::shares], key=lambda e: len(e.prompt))
    largest = -(-len(examples) // shares)
    size = -(-largest // count)
    for first in range(0, largest, size):
        yield mine[first : first + size]
