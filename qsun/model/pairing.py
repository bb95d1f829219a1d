"""Check that a prefill module fits a decode module. Engines do not: a wrong pair gives wrong text, not an error.

A decode module reads K and V that it did not compute. Both modules must agree on every shape, on how positions enter
(RoPE, windows), on what a token id means, and on the weights that they came from.

What qsun.json says, and which command writes it:

* decode module (`qsun quantize`): kind "decode_module", base_fingerprint, and prefill_modules, the fingerprints of
  those whose KV it was calibrated with;
* prefill module (`qsun tune`): kind "prefill_module", base_fingerprint (or base: {"fingerprint": ...}), fingerprint
  (`Checkpoint.fingerprint` of its own weights) and lineage, the fingerprints of the modules it was re-tuned from;
* LoRA adapter: besides, prefill_weights, "base" or "decode", and prefill_weights_fingerprint, that of the weights which
  it was tuned on. One on "decode" weights reads prompts with those of its decode module and fits no other.

A plain full-precision directory is a prefill module too. Its base is then unknown, and only its files are compared.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qsun.errors import QsunError, shortened
from qsun.model.architectures import kv_shape
from qsun.model.checkpoint import Checkpoint, files_fingerprint, read_json, stored_quantization
from qsun.model.locate import find_model, tokenizer_content, tokenizer_settings
from qsun.model.manifest import read_manifest
from qsun.model.skeleton import read_model_config

log = logging.getLogger(__name__)
ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
FEWEST_SAFE_BITS = 4  # below, a task that calibration left out is lost (docs/calibration.md)
_SAME_BASE = "use a prefill module that was tuned from the decode module's base"
_SAME_WEIGHTS = "use the decode module that it was tuned on, or qsun tune --init to tune it on this one's weights"
_SAME_TOKENIZER = "copy the tokenizer files of the decode module"
_NUMBERS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
_POSITIONS = ("rope_parameters", "partial_rotary_factor", "no_rope_layers", "sliding_window", "layer_types")
_SCORES = ("query_pre_attn_scalar", "attn_logit_softcapping")
_TOKENS = ("bos_token_id", "eos_token_id")
_VOCABULARY_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
_FAST_TOKENIZER = "tokenizer.json"


def check_pair(prefill: str | Path, decode: str | Path, same_weights: bool = True) -> None:
    """Raise QsunError where a prefill module does not fit a decode module; see `differences`."""
    found = differences(prefill, decode, same_weights)
    if found:
        more = f" ({len(found) - 1} more: qsun check-pair)" if len(found) > 1 else ""
        raise QsunError(f"prefill module {prefill} does not fit decode module {decode}: {found[0]}{more}")


def differences(prefill: str | Path, decode: str | Path, same_weights: bool = True) -> list[str]:
    """Return what keeps a prefill module from working with a decode module, with both values and the fix.

    Args:
        prefill: Hugging Face directory, LoRA adapter directory with a qsun.json, hub id or "demo".
        decode: decode module, or a full-precision base; its weights are read only where no qsun.json names the base.
        same_weights: compare the weights that an adapter was tuned on; False for one that is to be tuned on others.
    Returns:
        One line a difference, the most telling first; empty for a pair that fits.
    Raises:
        QsunError: a directory that is neither.
    """
    ours, theirs = find_model(str(prefill)), find_model(str(decode))
    if found := list(_role_differences(ours, theirs)):
        return found
    if (ours / "config.json").exists() or not (ours / ADAPTER).exists():
        found += _config_differences(ours, theirs)
    found += _tokenizer_differences(ours, theirs)
    return [*found, *_base_differences(ours, theirs), *(_weights_differences(ours, theirs) if same_weights else ())]


def check_served_pair(prefill: str | Path, decode: str | Path) -> None:
    """Raise what `check_pair` does, and log what `uncovered` finds."""
    check_pair(prefill, decode)
    warning = uncovered(prefill, decode)
    if warning:
        log.warning("%s", warning)


def uncovered(prefill: str | Path, decode: str | Path) -> str | None:
    """Return a warning if a decode module of few bits was calibrated with KV of other prefill modules than this one.

    A module that was re-tuned (`qsun tune --init`) from a covered one is covered.
    """
    ours, theirs = find_model(str(prefill)), find_model(str(decode))
    made = read_manifest(theirs)
    covered = {entry["fingerprint"] for entry in made.get("prefill_modules", [])}
    bits = fewest_bits(made)
    if not covered or bits >= FEWEST_SAFE_BITS or covered & _lineage(ours):
        return None
    names = ", ".join(dict.fromkeys(entry["name"] for entry in made["prefill_modules"]))
    return (
        f"decode module {decode} of {bits} bits was calibrated with the KV of {names}, not of {prefill}, whose answers "
        "may be lost; quantize again with a --calib and --calib-prefill for it, or use 4 bits"
    )


def fewest_bits(made: Mapping[str, Any]) -> int:
    """Return the fewest bits of a quantized layer, from a decode module's qsun.json; 16 if there is none."""
    return min((layer["bits"] for layer in made.get("layers", [])), default=16)


def find_base(decode: str | Path, base: str | Path | None = None) -> tuple[Path, str]:
    """Return directory and name of a decode module's full-precision base.

    The one given, the one that a quantized module names, or the decode module itself. Raises QsunError for none, or
    where the one that it names has changed since; that reads all of its weights.
    """
    directory = find_model(str(decode))
    if base is None and not stored_quantization(directory):
        return directory, str(decode)
    name = read_manifest(directory).get("base") if base is None else str(base)
    if not isinstance(name, str):
        raise QsunError(f"{decode} is quantized and does not say from which base; give it with --base")
    try:
        found = find_model(name)
    except QsunError:
        raise QsunError(f"{decode} was quantized from {name}, which was not found; give the base with --base") from None
    if base is None:
        check_made_from(directory, found)
    return found, name


def check_made_from(decode: Path, base: Path) -> None:
    """Raise QsunError for a base whose fingerprint is not the one in a decode module's qsun.json, if that has one."""
    wanted = base_fingerprint(read_manifest(decode))
    if wanted and (found := files_fingerprint(base)) != wanted:
        raise QsunError(
            f"{base} is not the base that {decode} was made from: their fingerprints differ ({found[:12]} and "
            f"{wanted[:12]}); give the right one with --base, or --prefill"
        )


def base_fingerprint(made: Mapping[str, Any]) -> str | None:
    """Return the fingerprint of the base that qsun.json of either kind names."""
    named = made.get("base_fingerprint")
    if named is None and isinstance(made.get("base"), Mapping):
        named = made["base"].get("fingerprint")
    return named if isinstance(named, str) else None


def _lineage(directory: Path) -> set[str]:
    """Return the fingerprints of a prefill module and of those it was re-tuned from."""
    return {weights_fingerprint(directory), *read_manifest(directory).get("lineage", [])}


def weights_fingerprint(directory: Path) -> str:
    """Return the fingerprint of a module's own weights, from qsun.json or computed."""
    own = read_manifest(directory).get("fingerprint")
    if isinstance(own, str):
        return own
    adapter = directory / ADAPTER_WEIGHTS
    is_adapter = (directory / ADAPTER).exists() and adapter.is_file()
    return Checkpoint(adapter if is_adapter else directory).fingerprint()


def on_decode_weights(adapter: Path) -> bool:
    """Whether an adapter was tuned on its decode module's own weights (`qsun tune --prefill-weights decode`)."""
    return read_manifest(adapter).get("prefill_weights") == "decode"


def _role_differences(ours: Path, theirs: Path) -> Iterator[str]:
    if read_manifest(theirs).get("kind", "").startswith("prefill"):
        yield f"{theirs} is a prefill module itself; give the decode module second"
    if (theirs / ADAPTER).exists() and not (theirs / "config.json").exists():
        yield f"{theirs} is a LoRA adapter; give the decode module second"
    if stored := stored_quantization(ours):
        method = stored.get("quant_method", "quantization_config")
        yield f"{ours} is quantized ({method}) and a prefill module is full precision; give the prefill module first"


def _config_differences(ours: Path, theirs: Path) -> Iterator[str]:
    a, b = (_facts(read_model_config(directory)) for directory in (ours, theirs))
    if a["model_type"] != b["model_type"]:  # all else would differ with it
        yield _line("model_type", a["model_type"], b["model_type"], _SAME_BASE)
        return
    for key in dict.fromkeys([*a, *b]):
        if a.get(key) != b.get(key):
            yield _line(key, a.get(key), b.get(key), _SAME_BASE)


def _facts(config: Any) -> dict[str, Any]:
    """Return what two modules must agree on, as a flat mapping."""
    values = config.to_dict()
    _, values["num_key_value_heads"], values["head_dim"] = kv_shape(config)
    if isinstance(values.get("eos_token_id"), int):
        values["eos_token_id"] = [values["eos_token_id"]]  # there may be several
    wanted = ("model_type", *_NUMBERS, *_POSITIONS, *_SCORES, *_TOKENS)
    return dict(_flat({key: values.get(key) for key in wanted}))


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, entry in value.items():
        if isinstance(entry, Mapping):
            yield from _flat(entry, f"{prefix}{key}.")
        else:
            yield prefix + key, entry


def _tokenizer_differences(ours: Path, theirs: Path) -> Iterator[str]:
    """Compare what tokenizers do, not how versions of transformers write them."""
    if (ours / ADAPTER).exists() and not any((ours / file).exists() for file in (_FAST_TOKENIZER, *_VOCABULARY_FILES)):
        return  # an adapter is served with the base's tokenizer
    fast = [_content(directory / _FAST_TOKENIZER) for directory in (ours, theirs)]
    if None in fast:
        for file in (_FAST_TOKENIZER, *_VOCABULARY_FILES):
            mine, other = (_content(directory / file) for directory in (ours, theirs))
            if mine != other:
                yield _line(file, _presence(mine), _presence(other), _SAME_TOKENIZER)
    elif fast[0] != fast[1]:
        a, b = (tokenizer_content(directory / _FAST_TOKENIZER) for directory in (ours, theirs))
        for key in dict.fromkeys([*a, *b]):
            if key not in ("version", "truncation", "padding") and a.get(key) != b.get(key):
                yield from _first_difference(f"{_FAST_TOKENIZER}: {key}", a.get(key), b.get(key))
    a, b = (tokenizer_settings(directory) for directory in (ours, theirs))
    for key in a:
        # transformers 5 does not write what tokenizer.json does anyway, which was compared above
        dropped = key.startswith("add_") and None in (a[key], b[key]) and None not in fast
        if a[key] != b[key] and not dropped:
            yield _line(f"tokenizer_config.json: {key}", a[key], b[key], _SAME_TOKENIZER)


def _first_difference(name: str, a: Any, b: Any) -> Iterator[str]:
    """Find where two JSON values first differ, so that the line names a token and not a whole file."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        key = next(key for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key))
        yield from _first_difference(f"{name}.{key}", a.get(key), b.get(key))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        place = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
        yield from _first_difference(f"{name}[{place}]", a[place], b[place])
    elif isinstance(a, list) and isinstance(b, list):
        yield _line(name, f"{len(a)} entries", f"{len(b)} entries", _SAME_TOKENIZER)
    else:
        yield _line(name, a, b, _SAME_TOKENIZER)


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None


def _presence(content: bytes | None) -> str:
    return "absent" if content is None else f"{len(content)} other bytes"


def _base_differences(ours: Path, theirs: Path) -> Iterator[str]:
    mine = base_fingerprint(read_manifest(ours))
    if mine is None and not (ours / ADAPTER).exists():
        return
    quantized = bool(stored_quantization(theirs))
    if mine is None:
        try:
            base = named_base(ours)
        except QsunError as error:
            yield str(error)
            return
        if not quantized and base.resolve() == theirs.resolve():
            return
        mine = files_fingerprint(base)
    wanted = base_fingerprint(read_manifest(theirs)) or (None if quantized else files_fingerprint(theirs))
    if wanted is not None and mine != wanted:
        yield _line("base fingerprint", mine[:16], wanted[:16], _SAME_BASE)


def _weights_differences(ours: Path, theirs: Path) -> Iterator[str]:
    if on_decode_weights(ours):
        mine, wanted = str(read_manifest(ours).get("prefill_weights_fingerprint")), files_fingerprint(theirs)
        if mine != wanted:
            yield _line("fingerprint of the weights under the adapter", mine[:16], wanted[:16], _SAME_WEIGHTS)


def named_base(adapter: Path) -> Path:
    """Return the base that adapter_config.json names. Raises QsunError where it names none, or it is not here."""
    name = read_json(adapter / ADAPTER).get("base_model_name_or_path")
    if not isinstance(name, str):
        raise QsunError(f"{adapter / ADAPTER} names no base_model_name_or_path")
    try:
        return find_model(name)
    except QsunError:
        raise QsunError(
            f"{adapter} is an adapter of {name}, which was not found; put it there, or name it in {ADAPTER}"
        ) from None


def _line(name: str, a: Any, b: Any, fix: str) -> str:
    return f"{name} is {_shown(a)} in the prefill module and {_shown(b)} in the decode module; {fix}"


def _shown(value: Any) -> str:
    return shortened(value if isinstance(value, str) else json.dumps(value, default=str), 60)
