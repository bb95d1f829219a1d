"""A request to tune, checked: what can be refused is refused here, before weights are loaded."""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsun.data.examples import TokenExample, check_vocabulary
from qsun.data.jsonl import check_no_pipe
from qsun.device import compute_dtype, default_device
from qsun.errors import OutOfMemory, QsunError
from qsun.memory import available_bytes, clear_out_of_memory
from qsun.model.checkpoint import Checkpoint, files_fingerprint
from qsun.model.locate import find_model, load_tokenizer
from qsun.model.lora import (
    Adapter,
    AdapterSettings,
    adapter_file,
    check_adapter,
    fresh_adapter,
    stored_adapter,
    target_names,
)
from qsun.model.output_dir import check_free, check_outside
from qsun.model.pairing import find_base, weights_fingerprint
from qsun.model.skeleton import EMBEDDING, HEAD, empty_model, read_model_config, weight_shape
from qsun.model.stored_layers import quantized_layer_names
from qsun.runtime.rotary import rope_boundary
from qsun.tuning.config import TuneConfig
from qsun.tuning.examples import crosses, draw, fingerprint, hold_out, read_examples, token_count
from qsun.tuning.optimizer import used_parameters
from qsun.tuning.start import Start, TeacherPlan, check_base, check_decode, find_start, find_teacher

log = logging.getLogger(__name__)
LESS_MEMORY = "more --grad-accum, --grad-checkpoint, a shorter --max-len, or --lora-rank"


@dataclass(frozen=True)
class TuneJob:
    """A checked request.

    Attributes:
        decode, base: directories. start: the first weights. teacher: whose distributions are learned.
        names: decode, base and data as the user named them.
        fingerprints: of base, decode and start.
        too_long: number of examples that max_len left out.
    """

    out: Path
    config: TuneConfig
    decode: Path
    base: Path
    start: Start
    teacher: TeacherPlan | None
    names: dict[str, str]
    fingerprints: dict[str, str]
    train: list[TokenExample]
    valid: list[TokenExample]
    too_long: int
    dtype: torch.dtype
    device: torch.device

    @property
    def steps(self) -> int:
        per_epoch = -(-len(self.train) // self.config.batch_size)
        return self.config.steps or self.config.epochs * per_epoch

    @property
    def peak_lr(self) -> float:
        return self.config.peak_lr(read_model_config(self.base).hidden_size, self.tunes_adapter)

    @property
    def tunes_adapter(self) -> bool:
        return self.start.is_adapter or bool(self.config.lora_rank)

    @property
    def kind(self) -> str:
        """What is tuned, in words."""
        if self.config.fine_tune:
            return "ordinary LoRA" if self.tunes_adapter else "full fine-tune"
        return "prefill module"

    @property
    def one_copy(self) -> bool:
        """Whether an adapter is tuned on the very weights of the decode module, which are then held once."""
        return self.tunes_adapter and not self.config.fine_tune and self.start.weights == self.decode

    def first_adapter(self, model: Any) -> Adapter | None:
        """Return the first weights of an adapter of this model, which may be on the meta device, if one is tuned."""
        if self.start.is_adapter:
            return stored_adapter(model, self.start.directory)
        settings = self.config.adapter
        if settings is None:
            return None
        return fresh_adapter(model, AdapterSettings(*settings), self.config.seed, self.config.lora_targets)

    def settings(self) -> dict[str, Any]:
        """Return everything that decides the weights; a resumed run must have the same."""
        data = {"train": fingerprint(self.train), "valid": fingerprint(self.valid)}
        return {
            **{key: value for key, value in self.config.to_dict().items() if key != "shard"},
            **self.fingerprints,
            **data,
            "compute_dtype": str(self.dtype),
            "device": self.device.type,
        }

    def plan(self, processes: int = 1) -> dict[str, Any]:
        """Describe the run. Bytes are estimates, without activations.

        memory_bytes is for each process; with `shard`, shared_bytes is what all of them hold together.
        """
        model = _outline(self.base)
        memory, shared = self._memory_bytes(model, processes)
        return {
            "training_examples": len(self.train),
            "validation_examples": len(self.valid),
            "too_long": self.too_long,
            "unanswered": sum(not example.response for example in (*self.train, *self.valid)),
            "steps": self.steps,
            "examples_per_step": self.config.batch_size,
            "tokens_per_epoch": token_count(self.train),
            "peak_lr": self.peak_lr,
            "weights": _numel(model.parameters()),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "processes": processes,
            "memory_bytes": memory,
            "shared_bytes": shared,
        }

    def check_memory(self, processes: int, device: torch.device) -> None:
        """Raise OutOfMemory if not even weights, gradients and the optimizer's state fit on this process's device."""
        needed, free = self.plan(processes)["memory_bytes"], available_bytes(device)
        if needed > free:
            raise OutOfMemory(
                f"tuning needs at least {needed / 2**30:.1f} GiB on {device}, with {free / 2**30:.1f} GiB free; use "
                "--lora-rank, --dtype bfloat16, or --shard over several processes"
            )

    def _adapter_sizes(self, model: Any) -> dict[str, int]:
        """Return how many weights the adapter has on each of the model's weights, by its name."""
        if self.start.is_adapter:
            file, layers = adapter_file(self.start.directory), check_adapter(model, self.start.directory)[1]
            return {f"{name}.weight": sum(math.prod(file.shape(part)) for part in layers[name]) for name in layers}
        names = target_names(model.config, self.config.lora_targets)
        return {f"{name}.weight": self.config.lora_rank * sum(weight_shape(model, name)) for name in names}

    def _teacher_weights(self) -> int:
        """Return the number of weights of a teacher's modules, dequantized."""
        if self.teacher is None:
            return 0
        return _numel(_outline(self.teacher.shaped).parameters()) * (1 if self.teacher.decode is None else 2)

    def _memory_bytes(self, model: Any, processes: int) -> tuple[int, int]:
        """Return the bytes of one process, and those that are spread over all of them. model: the base's outline."""
        fine_tune, sizes = self.config.fine_tune, {name: p.numel() for name, p in model.named_parameters()}
        weights, item = sum(sizes.values()), torch.finfo(self.dtype).bits // 8
        of_adapter = self._adapter_sizes(model) if self.tunes_adapter else {}
        # as `make_trainable` leaves them: a prefill module's KV does not depend on the last layer's q, o and MLP
        used = sizes.keys() if fine_tune else used_parameters(model)
        tuned = sum(size for name, size in (of_adapter or sizes).items() if name in used)
        adapter = sum(of_adapter.values())
        taught, frozen = item * self._teacher_weights(), _loaded_bytes(self.decode, item)
        if not self.config.shard:
            modules = frozen if self.one_copy else weights * item + (0 if fine_tune else frozen)
            own = 4 if self.tunes_adapter else item  # bytes of a tuned weight, and of its gradient
            # a share of float32 masters, moments and gradients; alone, float32 parameters and gradients are their own
            optimizer = 8 if own == 4 and processes == 1 else 16 / processes
            return modules + adapter * 4 + taught + int(tuned * (own + optimizer)), 0
        shared = taught + tuned * 16
        shared += weights * item + (adapter - tuned) * 4 if self.tunes_adapter else (weights - tuned) * item
        if not fine_tune:
            shared += frozen - sizes.get(HEAD, 0) * item  # which a prefill module does without
        block = _numel(model.model.layers[0].parameters())
        embedding = model.model.embed_tokens.weight.numel()
        # gathered at a time: two blocks and the gradient of one, or an embedding and its gradient
        gathered = max(block * (3 * item + 4), embedding * (2 * item + 4))
        return shared // processes + gathered, shared


def _outline(directory: Path) -> Any:
    """Return a directory's model on the meta device, whose tied embeddings are one parameter."""
    model = empty_model(read_model_config(directory)).to("meta")
    model.tie_weights()
    return model


def _numel(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _loaded_bytes(directory: Path, item: int) -> int:
    """Return the bytes of a loaded module: quantized layers as they are stored, everything else in the dtype."""
    stored = Checkpoint(directory)
    layers = set(quantized_layer_names(stored))
    packed = [name for name in stored.names() if name.rpartition(".")[0] in layers]
    tied = {HEAD} if read_model_config(directory).tie_word_embeddings else set()
    plain = set(stored.names()) - set(packed) - tied
    return stored.size_bytes(packed) + item * sum(math.prod(stored.shape(name)) for name in plain)


@clear_out_of_memory(instead=LESS_MEMORY)
def prepare_tuning(  # noqa: PLR0913, PLR0917
    decode: str | Path,
    out: str | Path,
    data: str | Path | Sequence[str | Path],
    config: TuneConfig | None = None,
    base: str | Path | None = None,
    eval_data: str | Path | Sequence[str | Path] | None = None,
    init: str | Path | None = None,
    teacher: str | Path | None = None,
    device: str | torch.device | None = None,
    resume: bool = False,
) -> TuneJob:
    """Check what can be checked before work starts; write nothing. Raises QsunError; see `tune`."""
    config, out = config or TuneConfig(), Path(out)
    check_free(out, resume)
    decode_dir = find_model(str(decode))
    check_decode(decode_dir)
    base_dir, base_name = find_base(decode, base)
    start = find_start(init, decode_dir, base_dir, config)
    teaching = None if teacher is None else find_teacher(str(teacher), decode_dir)
    for directory in (decode_dir, base_dir, start.directory):
        check_outside(out, directory)
    fingerprints = {name: files_fingerprint(path) for name, path in (("base", base_dir), ("decode", decode_dir))}
    fingerprints["start"] = fingerprints["base"] if init is None else weights_fingerprint(start.directory)
    check_base(str(decode), decode_dir, base_name, base_dir)
    tokenizer = load_tokenizer(decode_dir)
    if tokenizer is None:
        raise QsunError(f"{decode_dir} has no tokenizer, and training data is text")
    shapes = [read_model_config(base_dir), *([] if teaching is None else teaching.shapes)]
    read = partial(_read, tokenizer, config, shapes, teaching is None)
    train, too_long = read(data, "training")
    if eval_data is None:
        train, valid = hold_out(train, config.valid_fraction, config.seed)
    else:
        valid, _ = read(eval_data, "validation")
    valid = draw(valid, config.valid_examples, config.seed)
    where = default_device(device)
    names = {"decode": str(decode), "base": base_name, "data": ", ".join(_names(data))}
    if teaching is not None:
        names["teacher"] = teaching.name
        fingerprints["teacher"] = "+".join(teaching.fingerprints)
    dtype = compute_dtype(config.dtype, where, Checkpoint(base_dir).dtype(EMBEDDING), shapes[0].hidden_size)
    return TuneJob(
        out, config, decode_dir, base_dir, start, teaching, names, fingerprints, train, valid, too_long, dtype, where
    )


def _read(
    tokenizer: Any,
    config: TuneConfig,
    shapes: Sequence[Any],
    needs_response: bool,
    sources: str | Path | Sequence[str | Path],
    what: str,
) -> tuple[list[TokenExample], int]:
    """Read the examples that fit into all of these configs, the base's first, and count those that are too long."""
    if torch.distributed.is_torchelastic_launched():  # every process reads all data
        for name in _names(sources):
            check_no_pipe(Path(name), what)
    limit = min(config.max_len, *(shape.max_position_embeddings for shape in shapes))
    found, too_long = read_examples(_names(sources), tokenizer, limit, what, needs_response)
    boundaries = sorted({b for shape in shapes if (b := rope_boundary(shape)) is not None})
    examples = [e for e in found if not any(crosses(e, boundary) for boundary in boundaries)]
    named = " or ".join(map(str, boundaries))
    if len(examples) < len(found):
        log.warning(
            "%s data: left out %d examples that cross the model's original context of %s tokens, "
            "where its RoPE (longrope) changes", what, len(found) - len(examples), named,
        )  # fmt: skip
    if not examples:
        raise QsunError(f"{what} data has no examples on one side of the {named} tokens of longrope")
    tokens = ((*example.prompt, *example.response) for example in examples)
    check_vocabulary(tokens, shapes[0].vocab_size, tokenizer, f"{what} data")
    return examples, too_long


def _names(sources: str | Path | Sequence[str | Path]) -> list[str]:
    return [str(sources)] if isinstance(sources, (str, Path)) else [str(source) for source in sources]
