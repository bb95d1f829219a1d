"""Where tuning starts, on which weights an adapter is tuned, and who teaches; all of it as directories."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsun.errors import QsunError
from qsun.model.checkpoint import Checkpoint, check_full_precision, files_fingerprint, stored_quantization
from qsun.model.locate import find_model, load_tokenizer
from qsun.model.lora import ADAPTER_CONFIG, adapter_base, target_names
from qsun.model.manifest import read_manifest
from qsun.model.pairing import (
    base_fingerprint,
    check_made_from,
    check_pair,
    differences,
    named_base,
    on_decode_weights,
    weights_fingerprint,
)
from qsun.model.quantization_config import stored_format
from qsun.model.skeleton import read_model_config
from qsun.tuning.config import TuneConfig


@dataclass(frozen=True)
class Start:
    """The first weights.

    Attributes:
        directory: of the base, or of the module given as `init`.
        is_adapter: whether that is an adapter, which is tuned further.
        weights: directory of the full set of weights that is tuned, or that an adapter is tuned on.
        on_decode: whether these are the decode module's.
    """

    directory: Path
    is_adapter: bool
    weights: Path
    on_decode: bool


def find_start(init: str | Path | None, decode: Path, base: Path, config: TuneConfig) -> Start:
    """Return where tuning starts. Raises QsunError if `init` and the settings contradict each other."""
    target_names(read_model_config(decode), config.lora_targets)  # raises if there is no such layer
    start = base if init is None else _init(str(init), decode, base, config)
    is_adapter = init is not None and (start / ADAPTER_CONFIG).exists()
    on_decode = config.prefill_weights == "decode" or (is_adapter and on_decode_weights(start))
    if on_decode and not (is_adapter or config.lora_rank):
        instead = f"init {init} is a full module" if init is not None else "no lora_rank is given"
        raise QsunError(
            "prefill_weights decode keeps the decode module's weights and tunes an adapter on them, but "
            f"{instead}; add lora_rank, or use prefill_weights base"
        )
    return Start(start, is_adapter, decode if on_decode else base if is_adapter else start, on_decode)


def _init(init: str, decode: Path, base: Path, config: TuneConfig) -> Path:
    start = find_model(init)
    check_pair(start, decode, same_weights=False)
    if config.lora_rank:
        raise QsunError(f"lora_rank {config.lora_rank} with an init: {init} decides what is tuned; leave one out")
    if (start / ADAPTER_CONFIG).exists():
        if (base_fingerprint(read_manifest(start)) or files_fingerprint(named_base(start))) != files_fingerprint(base):
            raise QsunError(f"init {init} is an adapter of another base than {base}: their fingerprints differ")
        if config.fine_tune:
            raise QsunError(f"baseline full starts from whole weights, but {init} is an adapter; leave one of them out")
    else:
        check_full_precision(Checkpoint(start))
    return start


def check_decode(decode: Path) -> None:
    """Raise QsunError for a decode module whose weights cannot be read, such as FP8, and say what it is."""
    stored = stored_quantization(decode)
    if not stored:
        check_full_precision(Checkpoint(decode))
        return
    try:
        stored_format(stored)
    except QsunError as error:
        raise QsunError(f"decode module {decode}: {error}, or its full-precision base") from None


def check_base(decode_name: str, decode: Path, base_name: str, base: Path) -> None:
    """Raise QsunError for a base that is quantized or not the decode module's."""
    check_full_precision(Checkpoint(base))
    check_made_from(decode, base)
    different = differences(base, decode)
    if different:
        raise QsunError(f"base {base_name} does not fit decode module {decode_name}: {different[0]}")


@dataclass(frozen=True)
class TeacherPlan:
    """A teacher on disk.

    Attributes:
        name: as the user gave it. directory: of a whole model, an adapter to merge, or a prefill module.
        shaped: of a model of its shape: an adapter's base, or itself.
        decode: of the decode module that reads the prefill module's KV; None for a whole model.
        fingerprints: of its weights.
    """

    name: str
    directory: Path
    shaped: Path
    decode: Path | None
    fingerprints: tuple[str, ...]

    @property
    def shapes(self) -> list[Any]:
        """The configs of its models, whose limits on length hold for the examples too."""
        return [read_model_config(path) for path in (self.shaped, self.decode) if path is not None]


def find_teacher(name: str, decode: Path) -> TeacherPlan:
    """Find a teacher for a decode module: a prefill module with the decode module it was tuned against, else one model.

    Raises:
        QsunError: it is missing, its decode module is not here or was changed, or its vocabulary is another.
    """
    directory = find_model(name)
    made = read_manifest(directory)
    reader = None
    if made.get("kind") == "prefill_module":
        try:
            reader = find_model(str(made.get("decode")))
        except QsunError:
            raise QsunError(
                f"teacher {name} is a prefill module of {made.get('decode')}, which was not found; put it there, or "
                "give a whole model"
            ) from None
        check_pair(directory, reader)
        if made.get("decode_fingerprint", now := files_fingerprint(reader)) != now:
            raise QsunError(
                f"teacher {name} was tuned against another decode module than the one that is now {reader}; put that "
                "one back, or give a whole model"
            )
    shaped = adapter_base(directory) if (directory / ADAPTER_CONFIG).exists() else directory
    _check_vocabulary(name, shaped, directory, decode)
    files = (weights_fingerprint(directory), *([files_fingerprint(reader)] if reader else []))
    return TeacherPlan(name, directory, shaped, reader, files)


def _check_vocabulary(name: str, shaped: Path, directory: Path, decode: Path) -> None:
    sizes = [read_model_config(path).vocab_size for path in (shaped, decode)]
    if sizes[0] != sizes[1]:
        raise QsunError(f"teacher {name} has {sizes[0]} tokens, the decode module {sizes[1]}; use one of its base")
    theirs, ours = load_tokenizer(directory) or load_tokenizer(shaped), load_tokenizer(decode)
    if theirs is None or ours is None:
        return
    mine, other = (tokenizer.get_vocab() for tokenizer in (ours, theirs))
    odd = next((token for token in mine if mine[token] != other.get(token)), None)
    if odd is not None:
        raise QsunError(
            f"teacher {name} has another vocabulary: token {odd!r} is {other.get(odd)} there and {mine[odd]} in the "
            "decode module; use a teacher of its base"
        )
