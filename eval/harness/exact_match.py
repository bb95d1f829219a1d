"""Exact match of answers generated over the seam, as a user of the served model sees them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qsun.demo.tasks import TaskExample, check
from qsun.engine.generation import generate
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


def exact_match(
    task: str,
    examples: Sequence[TaskExample],
    prefill: PrefillModule,
    decode: DecodeModule,
    max_new_tokens: int = 64,
    batch_size: int = 128,
) -> Score:
    """Generate greedy answers with a pair of modules and compare them with the right ones."""
    prompts = [example.prompt for example in examples]
    answers = generate(prefill, decode, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return Score(tuple(check(task, example, answer) for example, answer in zip(examples, answers, strict=True)))
