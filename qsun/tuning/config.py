"""The settings of tuning: built from the command line, YAML or Python, validated here, saved with the result."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qsun.config import DTYPES, check_between, check_one_of
from qsun.errors import QsunError

BASELINES = ("none", "full")


@dataclass(frozen=True)
class TuneConfig:
    """Everything that decides a prefill module, apart from its base, its decode module and the data.

    Attributes:
        epochs: passes over the training data. steps: if not 0, optimizer steps instead.
        lr: peak learning rate; 0 chooses one from the model's width (`peak_lr`).
        batch_size: examples of one optimizer step, over all processes and pieces.
        grad_accum: pieces in which each process computes its share of a step.
        grad_checkpoint: compute each block's activations again in the backward pass instead of keeping them.
        shard: each process holds a share of all weights instead of all of them (sharded.py).
        max_len: tokens of prompt and response; longer examples are left out, and counted in the report.
        warmup: fraction of the steps over which the rate rises; it then falls along a cosine to min_lr of its peak.
        clip: largest norm of the gradient. weight_decay: of AdamW.
        lora_rank: 0 tunes all weights; otherwise a LoRA adapter of this rank (lora_alpha is twice the rank).
        eval_every: steps between validations; 0: ten in a run.
        valid_fraction: of the training data, held out if no validation data is given.
        valid_examples: of the validation data, drawn once and used in every validation; 0: all.
        baseline: "full" trains the conventional full fine-tune instead of a prefill module.
        dtype: of the forward pass; auto is float32 on a CPU and the base's own on a GPU. Master weights are float32.
    """

    epochs: int = 3
    steps: int = 0
    lr: float = 0.0
    batch_size: int = 16
    grad_accum: int = 1
    grad_checkpoint: bool = False
    shard: bool = False
    max_len: int = 2048
    warmup: float = 0.05
    min_lr: float = 0.05
    clip: float = 1.0
    weight_decay: float = 0.0
    lora_rank: int = 0
    eval_every: int = 0
    valid_fraction: float = 0.05
    valid_examples: int = 256
    baseline: str = "none"
    seed: int = 0
    dtype: str = "auto"

    def __post_init__(self) -> None:
        check_one_of("baseline", self.baseline, BASELINES)
        check_one_of("dtype", self.dtype, DTYPES)
        check_one_of("grad_checkpoint", self.grad_checkpoint, (True, False))
        check_one_of("shard", self.shard, (True, False))
        for name, low, high in (
            ("epochs", 1, 100_000),
            ("steps", 0, 1 << 40),
            ("lr", 0.0, 10.0),
            ("batch_size", 1, 1 << 20),
            ("grad_accum", 1, 1 << 20),
            ("max_len", 2, 1 << 20),
            ("warmup", 0.0, 1.0),
            ("min_lr", 0.0, 1.0),
            ("clip", 1e-9, 1e9),
            ("weight_decay", 0.0, 1.0),
            ("lora_rank", 0, 4096),
            ("eval_every", 0, 1 << 40),
            ("valid_fraction", 0.0, 0.9),
            ("valid_examples", 0, 1 << 40),
            ("seed", 0, 2**32 - 1),
        ):
            check_between(name, getattr(self, name), low, high)
        if self.fine_tune and self.lora_rank:
            raise QsunError(f"baseline full tunes all weights, but lora_rank is {self.lora_rank}; leave one out")

    @property
    def fine_tune(self) -> bool:
        """Whether a conventional full fine-tune is trained, to compare with."""
        return self.baseline == "full"

    def peak_lr(self, hidden_size: int) -> float:
        """Return lr, or one that falls with the model's width: 3e-3 at 128 (docs/tuning.md), 5 times that for LoRA."""
        return self.lr or 3e-3 * (128 / hidden_size) ** 1.5 * (5 if self.lora_rank else 1)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TuneConfig":
        """Build settings from plain values. Raises QsunError for an unknown key or an invalid value."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(map(str, set(values) - known))
        if unknown:
            raise QsunError(f"unknown setting {unknown[0]!r}; known are: {', '.join(sorted(known))}")
        return cls(**values)
