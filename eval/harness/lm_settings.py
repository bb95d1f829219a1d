"""What lm-eval's `--model_args`, `--device` and `--gen_kwargs` mean for a pair of modules."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from qsun.config import DTYPES, check_one_of
from qsun.device import default_device
from qsun.errors import QsunError
from qsun.model.checkpoint import stored_quantization
from qsun.model.locate import find_model, load_tokenizer
from qsun.model.pairing import check_made_from
from qsun.runtime.decode_module import DecodeModule, load_decode
from qsun.runtime.prefill_module import PrefillModule, load_prefill

PASSED_ON = (
    "max_length",
    "truncation",
    "logits_cache",
    "softmax_dtype",
    "use_fast_tokenizer",
    "add_bos_token",
    "prefix_token_id",
    "think_end_token",
    "enable_thinking",
    "chat_template_args",
)
_OWN = ("decode", "prefill", "device", "dtype", "batch_size", "max_batch_size")
_WITHOUT_EFFECT: dict[str, Any] = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1}
_SAMPLING = ("temperature", "top_p", "top_k")


def check_settings(decode: str | DecodeModule, batch_size: int | str, settings: Mapping[str, Any]) -> None:
    """Raise QsunError for names that HFLM would ignore, and for values that it only asserts."""
    if not decode:
        raise QsunError("no decode module; give --model_args decode=DIR, and prefill=DIR for the prefill module")
    unknown = sorted(set(settings) - set(PASSED_ON))
    if unknown:
        raise QsunError(f"unknown model argument {unknown[0]!r}; known are: {', '.join((*_OWN, *PASSED_ON))}")
    text = str(batch_size)
    if not text.startswith("auto") and not (text.isdecimal() and int(text)):
        raise QsunError(f"batch_size {batch_size!r} is out of range; use 1 or more, or auto")


def device_of(device: str | torch.device | None) -> torch.device:
    """Return the device; as in lm-eval's own models, the CPU if a GPU is asked for and missing."""
    wanted = default_device(device or "cuda")
    return wanted if wanted.type != "cuda" or torch.cuda.is_available() else torch.device("cpu")


def launched_processes(device: torch.device) -> Accelerator | None:
    """Return the processes that `accelerate launch` started; None for a single process."""
    if not (torch.distributed.is_torchelastic_launched() or torch.distributed.is_initialized()):
        return None
    # The first process waits for the others' shares of the work, however long they take.
    patience = InitProcessGroupKwargs(timeout=timedelta(weeks=52))
    found = Accelerator(cpu=device.type == "cpu", kwargs_handlers=[patience])
    return found if found.num_processes > 1 else None


def load_pair(
    decode: str | DecodeModule,
    prefill: str | PrefillModule | None,
    device: torch.device,
    dtype: str | torch.dtype | None,
) -> tuple[PrefillModule, DecodeModule]:
    """Load both modules of a pair and check that they are compatible.

    Args:
        decode, prefill: names, or two loaded modules.
        prefill: None: decode itself if it is full precision, otherwise the base that its qsun.json names.
        dtype: None or "auto": the stored dtype.
    Raises:
        QsunError: a missing directory or tokenizer, or a quantized module whose base cannot be found.
    """
    wanted = None if dtype is None or str(dtype) == "auto" else str(dtype).removeprefix("torch.")
    check_one_of("dtype", wanted or "auto", DTYPES)
    if isinstance(decode, DecodeModule) and isinstance(prefill, PrefillModule):
        return prefill, decode
    path = find_model(str(decode))
    if load_tokenizer(path) is None:
        raise QsunError(f"decode module {decode} has no tokenizer; copy the tokenizer files of its base into it")
    module = load_decode(path, device, wanted)
    if prefill is not None:
        return load_prefill(str(prefill), module, wanted), module
    if not stored_quantization(path):
        return PrefillModule(module.model, module.directory, module.manifest), module
    base = module.manifest.get("base")
    try:
        directory = find_model(str(base))
    except QsunError:
        named = f"names {base} as its base, which was not found" if base else "names no base"
        raise QsunError(f"decode module {decode} {named}; give --model_args prefill=DIR") from None
    check_made_from(path, directory)
    return load_prefill(directory, module, wanted), module


def sampling_settings(settings: Mapping[str, Any], decode: DecodeModule, rows: int) -> dict[str, Any]:
    """Translate lm-eval's generation arguments into generate's settings.

    Defaults come from the model's generation_config.json; what that does not set is off. Seeds come from torch's global
    generator, which lm-eval seeds: repeats of a prompt differ, runs do not.

    Args:
        settings: do_sample, temperature, top_p, top_k; others only with a value that has no effect.
        rows: prompts in the batch.
    Raises:
        QsunError: a setting that generation over the seam does not support.
    """
    for name, value in settings.items():
        known = name in (*_SAMPLING, "do_sample", "use_cache") or value is None or _WITHOUT_EFFECT.get(name) == value
        if not known:
            raise QsunError(
                f"generation setting {name}={value!r} is not supported; use do_sample, {', '.join(_SAMPLING)}"
            )
    if not settings.get("do_sample"):
        return {"temperature": 0.0}
    own = {name: getattr(decode.model.generation_config, name, None) for name in _SAMPLING}
    given = {name: settings.get(name) for name in _SAMPLING}
    chosen = {name: given[name] if given[name] is not None else own[name] for name in _SAMPLING}
    seeds = torch.randint(2**62, (rows,)).tolist()
    return {name: value for name, value in chosen.items() if value is not None} | {"seed": seeds}
