"""Training examples: a prompt and its response as tokens, from prompt/response rows or from chats.

Every assistant turn of a chat is one example, whose prompt is all that stands before it as the model's template
renders it.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qsun.data.chat import assistant_turns, render_turn, rendered_tokens
from qsun.data.jsonl import read_rows, text_of
from qsun.errors import QsunError
from qsun.model.locate import encode
from qsun.runtime.seam import IGNORED, SeamBatch


@dataclass(frozen=True)
class Example:
    """Token ids; the response ends with the model's EOS token where it has one."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]


def read_examples(
    sources: Sequence[str], tokenizer: Any, max_len: int, what: str = "training"
) -> tuple[list[Example], int]:
    """Examples of .jsonl files, and how many were left out because they are longer than max_len.

    Raises:
        QsunError: a file or row that cannot be used, or nothing left; names file and line.
    """
    examples: list[Example] = []
    too_long = 0
    for source in sources:
        for where, row in read_rows(Path(source), what):
            for example in _examples_of(row, tokenizer, where):
                if len(example.prompt) + len(example.response) > max_len:
                    too_long += 1
                else:
                    examples.append(example)
    if not examples:
        left_out = f": all {too_long} are longer than max_len {max_len}" if too_long else ""
        raise QsunError(f"{what} data {', '.join(map(str, sources))} has no examples{left_out}")
    return examples, too_long


def _examples_of(row: Mapping[str, Any], tokenizer: Any, where: str) -> Iterator[Example]:
    if "messages" in row:
        yield from _chat_examples(tokenizer, row, where)
    elif "prompt" in row and "response" in row:
        prompt = encode(tokenizer, text_of(row, "prompt", where))
        response = rendered_tokens(tokenizer, text_of(row, "response", where))
        yield _example(tokenizer, prompt, response, where)
    else:
        raise QsunError(f"{where}: needs 'messages', or 'prompt' and 'response'; it has {', '.join(row) or 'nothing'}")


def _example(tokenizer: Any, prompt: list[int], response: list[int], where: str) -> Example:
    end = tokenizer.eos_token_id
    if end is not None and end in response:
        response = response[: len(response) - response[::-1].index(end)]  # what a template adds behind it is no answer
    elif end is not None:
        response = [*response, end]
    if not prompt or not response:
        raise QsunError(f"{where}: the {'response' if prompt else 'prompt'} has no tokens")
    return Example(tuple(prompt), tuple(response))


def _chat_examples(tokenizer: Any, row: Mapping[str, Any], where: str) -> Iterator[Example]:
    for turn in assistant_turns(row["messages"], where):
        prompt, whole = render_turn(tokenizer, row, turn, where)
        if not whole.startswith(prompt):
            raise QsunError(
                f"{where}: the model's chat template renders the prompt of message {turn} differently once it is "
                "answered; give 'prompt' and 'response' instead"
            )
        head, tail = (rendered_tokens(tokenizer, text) for text in (prompt, whole[len(prompt) :]))
        yield _example(tokenizer, head, tail, where)


def fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 of the tokens, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.prompt, example.response]).encode())
    return digest.hexdigest()


def hold_out(examples: list[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and validation examples, by a draw. Equal prompts stay on one side, so that none is learnt by heart."""
    prompts = sorted({example.prompt for example in examples})
    count = max(1, round(fraction * len(prompts)))
    if len(prompts) <= count or not fraction:
        raise QsunError(
            f"{len(prompts)} different prompts are too few to hold {fraction:.0%} of them out; give validation data"
        )
    chosen = set(random.Random(seed).sample(prompts, count))
    return [e for e in examples if e.prompt not in chosen], [e for e in examples if e.prompt in chosen]


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of the examples in an epoch; it needs no state, so a resumed run finds its place."""
    order = list(range(count))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


def collate(examples: Sequence[Example], least_prefix: int = 0) -> SeamBatch:
    """Prompts without their last token to the left of the seam, that token and the response to its right.

    least_prefix: columns that the prefix has at least; padding, where no prompt needs them.
    """
    P = max(least_prefix, max(len(e.prompt) for e in examples) - 1)
    R = max(len(e.response) for e in examples)
    prefix = torch.zeros(len(examples), P, dtype=torch.int64)
    rest = torch.zeros(len(examples), R, dtype=torch.int64)
    labels = torch.full((len(examples), R), IGNORED)
    for row, example in enumerate(examples):
        head = example.prompt[:-1]
        prefix[row, P - len(head) :] = torch.tensor(head, dtype=torch.int64)
        fed = (example.prompt[-1], *example.response[:-1])
        rest[row, : len(fed)] = torch.tensor(fed)
        labels[row, : len(fed)] = torch.tensor(example.response)
    return SeamBatch(prefix, rest, labels, torch.tensor([P + 1 - len(e.prompt) for e in examples]))
