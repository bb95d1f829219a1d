"""Answers generated over the seam, as a user of the served model sees them, and how many are right."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qsun.data.examples import TokenExample
from qsun.engine.generation import generate
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


def score_examples(
    examples: Sequence[TokenExample],
    scorer: Scorer,
    prefill: PrefillModule,
    decode: DecodeModule,
    batch_size: int = 64,
) -> Score:
    """Score greedy answers of a pair of modules to tokenized examples.

    An answer may be a quarter longer than the longest right response.

    Raises:
        QsunError: the prefill module has no tokenizer.
    """
    tokenizer = load_tokenizer(prefill.directory)
    if tokenizer is None:
        raise QsunError(f"{prefill.directory} has no tokenizer, and scorers compare text")
    longest = max(len(example.response) for example in examples)
    prompts = [list(example.prompt) for example in examples]
    answers = generate(prefill, decode, prompts, max_new_tokens=longest + longest // 4 + 1, batch_size=batch_size)
    texts = [
        tokenizer.batch_decode(each, skip_special_tokens=True) for each in (answers, [e.response for e in examples])
    ]
    return Score(tuple(bool(scorer(answer, right)) for answer, right in zip(*texts, strict=True)))
