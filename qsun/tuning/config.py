"""The settings of tuning: built from the command line, YAML or Python, validated here, saved with the result."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from qsun.config import Dtype, Settings
from qsun.errors import QsunError

_Natural = Annotated[int, Field(ge=0, le=1 << 40)]
_Fraction = Annotated[float, Field(ge=0, le=1)]


def _listed(names: Any) -> Any:
    """Return names as a tuple; several may stand in one text, with commas between."""
    texts = [names] if isinstance(names, str) else names
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        return names
    return tuple(name.strip() for text in texts for name in text.split(",") if name.strip())


class TuneConfig(Settings):
    """Everything that decides a prefill module, apart from its base, its decode module and the data.

    Attributes:
        epochs: passes over the training data. steps: if not 0, optimizer steps instead.
        lr: peak learning rate; 0 chooses one from the model's width (`peak_lr`).
        batch_size: examples of one optimizer step, over all processes and pieces.
        grad_accum: pieces in which each process computes its share of a step.
        grad_checkpoint: compute each block's activations again in the backward pass instead of keeping them.
        shard: each process holds a share of all weights instead of all of them (sharded.py).
        group_by_length: batches of examples of like length, so that little is padding; False: drawn at random.
        max_len: tokens of prompt and response; longer examples are left out, and counted in the report.
        warmup: fraction of the steps over which the rate rises; it then falls along a cosine to min_lr of its peak.
        clip: largest norm of the gradient. weight_decay: of AdamW.
        prefill_weights: what an adapter is tuned on: the full-precision base, or the decode module's own weights, which
            then read prompts too (one copy serves both).
        lora_rank: 0 tunes all weights; otherwise a LoRA adapter of this rank.
        lora_alpha: the adapter is scaled by lora_alpha / lora_rank; 0: by 2, with lora_rslora by 8 / sqrt(lora_rank).
        lora_rslora: divide lora_alpha by the root of the rank instead (arXiv 2312.03732).
        lora_targets: linear layers that get an adapter, such as q_proj; empty: all of the blocks.
        teacher_weight: share of KL(teacher || module) in the loss, if there is a teacher; the rest is cross-entropy.
        teacher_tokens: longest answer of the teacher to a prompt without a response.
        eval_every: steps between validations; 0: ten in a run.
        valid_fraction: of the training data, held out if no validation data is given.
        valid_examples: of the validation data, drawn once and used in every validation; 0: all.
        baseline: "full" trains a conventional fine-tune instead of a prefill module: one model reads and writes. With
            lora_rank it is an ordinary LoRA on the base.
        dtype: of the forward pass; auto as in `qsun.device.compute_dtype`. Master weights are float32.
    """

    epochs: Annotated[int, Field(ge=1, le=100_000)] = 3
    steps: _Natural = 0
    lr: Annotated[float, Field(ge=0, le=10)] = 0.0
    batch_size: Annotated[int, Field(ge=1, le=1 << 20)] = 16
    grad_accum: Annotated[int, Field(ge=1, le=1 << 20)] = 1
    grad_checkpoint: bool = False
    shard: bool = False
    group_by_length: bool = False
    max_len: Annotated[int, Field(ge=2, le=1 << 20)] = 2048
    warmup: _Fraction = 0.05
    min_lr: _Fraction = 0.05
    clip: Annotated[float, Field(ge=1e-9, le=1e9)] = 1.0
    weight_decay: _Fraction = 0.0
    prefill_weights: Literal["base", "decode"] = "base"
    lora_rank: Annotated[int, Field(ge=0, le=4096)] = 0
    lora_alpha: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    lora_rslora: bool = False
    lora_targets: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    teacher_weight: _Fraction = 1.0
    teacher_tokens: Annotated[int, Field(ge=1, le=1 << 20)] = 256
    eval_every: _Natural = 0
    valid_fraction: Annotated[float, Field(ge=0, le=0.9)] = 0.05
    valid_examples: _Natural = 256
    baseline: Literal["none", "full"] = "none"
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    dtype: Dtype = "auto"

    @model_validator(mode="after")
    def _adapter_or_full(self) -> Self:
        if self.fine_tune and self.prefill_weights == "decode":
            raise QsunError("baseline full tunes the full-precision base; leave prefill_weights decode out")
        without = [key for key in ("lora_alpha", "lora_rslora", "lora_targets") if getattr(self, key)]
        if without and not self.lora_rank:
            raise QsunError(f"{without[0]} has no effect without a LoRA adapter; add lora_rank, or leave it out")
        return self

    @property
    def adapter(self) -> tuple[int, float, bool] | None:
        """Rank, alpha and rslora of a fresh adapter; None where all weights are tuned."""
        rank, rslora = self.lora_rank, self.lora_rslora
        return (rank, self.lora_alpha or (8.0 if rslora else 2.0 * rank), rslora) if rank else None

    @property
    def fine_tune(self) -> bool:
        """Whether a conventional fine-tune is trained, to compare with."""
        return self.baseline == "full"

    def peak_lr(self, hidden_size: int, adapter: bool = False) -> float:
        """Return lr, or one that falls with the model's width: 3e-3 at 128, 6e-3 for an adapter (docs/tuning.md).

        A full fine-tune's falls faster: at 576 a third of a prefill module's rate was better for it.
        """
        narrower = 128 / hidden_size
        if adapter or self.lora_rank:
            return self.lr or 6e-3 * narrower
        return self.lr or 3e-3 * narrower ** (1.5 if self.fine_tune else 1.0)
