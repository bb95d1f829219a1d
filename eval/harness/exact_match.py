"""Answers generated over the seam, as a user of the served model sees them, and how many are right."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qsun.data.examples import TokenExample
from qsun.engine.generation import generate
from qsun.engine.requests import most_new_tokens
from qsun.errors import QsunError
from qsun.eval.harness.scorers import Scorer
from qsun.model.locate import load_tokenizer
from qsun.runtime.decode_module import DecodeModule
from qsun.runtime.prefill_module import PrefillModule


@dataclass(frozen=True)
class Score:
    """Whether each example was answered correctly, in order."""

    right: tuple[bool, ...]

    @property
    def rate(self) -> float:
        return sum(self.right) / len(self.right)

    @property
    def stderr(self) -> float:
        """Standard error of the rate as a binomial proportion."""
        return math.sqrt(self.rate * (1 - self.rate) / len(self.right))


def answer_limits(examples: Sequence[TokenExample], config: Any) -> list[int]:
    """Return the most tokens of each answer.

    An answer may be a quarter longer than the longest right response, as far as the model's positions reach.

    Args:
        config: transformers' config of the model.
    Raises:
        QsunError: a right response is longer than what the model can write behind its prompt.
    """
    longest = max(len(example.response) for example in examples)
    positions = config.max_position_embeddings
    limits = []
    for example in examples:
        room = most_new_tokens(config, positions, len(example.prompt))
        if len(example.response) > room:
            raise QsunError(
                f"a test example has a prompt of {len(example.prompt)} tokens and a response of "
                f"{len(example.response)}, and behind that prompt the model can write {max(0, room)}; leave it out"
            )
        limits.append(min(room, longest + longest // 4 + 1))
    return limits


def score_examples(
    examples: Sequence[TokenExample],
    scorer: Scorer,
    prefill: PrefillModule,
    decode: DecodeModule,
    batch_size: int = 64,
) -> Score:
    """Score greedy answers of a pair of modules to tokenized examples.

    Raises:
        QsunError: the prefill module has no tokenizer, or as `answer_limits` does.
    """
    tokenizer = load_tokenizer(prefill.directory)
    if tokenizer is None:
        raise QsunError(f"{prefill.directory} has no tokenizer, and scorers compare text")
    limits = answer_limits(examples, decode.model.config)
    answers: list[Sequence[int]] = [() for _ in examples]
    for limit in sorted(set(limits), reverse=True):  # one, unless positions run out behind a long prompt
        places = [place for place, own in enumerate(limits) if own == limit]
        prompts = [list(examples[place].prompt) for place in places]
        found = generate(prefill, decode, prompts, max_new_tokens=limit, batch_size=batch_size)
        for place, answer in zip(places, found, strict=True):
            answers[place] = answer
    texts = [
        tokenizer.batch_decode(each, skip_special_tokens=True) for each in (answers, [e.response for e in examples])
    ]
    return Score(tuple(bool(scorer(answer, right)) for answer, right in zip(*texts, strict=True)))
