"""`qsun bench adapters`: unmerged adapters against one full prefill module: prefill, decode, loading and bytes."""

import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qsun.adapters.adapter_module import AdapterLibrary
from qsun.adapters.adapter_weights import AdapterWeights
from qsun.adapters.shared_prefill import SharedPrefill
from qsun.engine.config import Sampling
from qsun.engine.decode.fixed_slots import budget_for
from qsun.engine.decode_batch import DecodeBatch
from qsun.engine.requests import Request
from qsun.engine.row import DecodeRow
from qsun.eval.speed.clock import in_turns, seconds_of
from qsun.eval.speed.decode_speed import take_step
from qsun.model.checkpoint import files_fingerprint
from qsun.model.lora import AdapterSettings, adapter_file, fresh_adapter, write_adapter
from qsun.model.manifest import MANIFEST, write_json
from qsun.model.pairing import find_base
from qsun.model.skeleton import HEAD, empty_model
from qsun.progress import Note
from qsun.runtime.decode_module import DecodeModule
from qsun.runtime.seam import prefilled_rows

_CHUNK_TOKENS = 2048  # as the engine's default
_LOADS = 5


@dataclass(frozen=True)
class AdapterRun:
    """What to measure.

    Attributes:
        count: adapters, all different, with a prompt each. rank: of all of them, on all linear layers of the blocks.
        prompt_tokens: of each prompt. rounds: turns of each side in prefill. steps: turns in decode.
        on_decode: adapters share the decode module's own weights; otherwise those of its full-precision base.
    """

    count: int = 16
    rank: int = 16
    prompt_tokens: int = 64
    rounds: int = 9
    steps: int = 48
    on_decode: bool = False


@torch.no_grad()
def bench_adapters(decode: DecodeModule, run: AdapterRun, note: Note = lambda _: None) -> dict[str, Any]:
    """Compare a batch of different adapters with a batch of one full module, whose weights are those they share.

    Returns:
        Seconds and their ratios (on a CPU, CPU seconds of this process), medians of turns; bytes of all weights.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = AdapterLibrary(decode)
        first = [_written(Path(folder) / f"{number}", decode, run, number) for number in range(run.count)]
        modules = [library.open(directory) for directory in first]
        adapters, shared = [module.load() for module in modules], modules[0].shared
        note(f"{run.count} adapters of {adapters[0].size_bytes / 1e6:.1f} MB")
        more = [_written(Path(folder) / f"more{number}", decode, run, number) for number in range(_LOADS)]
        loads = [seconds_of(lambda path=path: library.open(path).load(), shared.device, own=True) for path in more]  # type: ignore[misc]
    taken = _prefill_turns(shared, adapters, run) | {"load": statistics.median(loads)}
    note(f"prefill of the batch: {taken['prefill'] / taken['prefill_of_one_module']:.3f} of one module's time")
    taken |= _decode_turns(decode, shared, adapters, run)
    tied = (HEAD,) if shared.skeleton.config.tie_word_embeddings else ()
    parameters = dict(shared.skeleton.named_parameters())
    full = sum(p.numel() for name, p in parameters.items() if name not in tied) * shared.dtype.itemsize
    return {
        "adapters": run.count,
        "rank": run.rank,
        "prompt_tokens": run.prompt_tokens,
        "prefill_weights": "decode" if run.on_decode else "base",
        "dtype": str(shared.dtype).removeprefix("torch."),
        "seconds": taken,
        "prefill_ratio": taken["prefill"] / taken["prefill_of_one_module"],
        "decode_ratio": taken["decode"] / taken["decode_of_base"],
        "adapter_bytes": sum(adapter.size_bytes for adapter in adapters),
        "bytes": _bytes(decode.model, shared.model) + sum(adapter.size_bytes for adapter in adapters),
        "merged_bytes": _bytes(decode.model) + run.count * full,
    }


def _written(directory: Path, decode: DecodeModule, run: AdapterRun, seed: int) -> Path:
    """Write an adapter with random weights, as `qsun tune` would."""
    base, outline = find_base(decode.directory)[0], empty_model(decode.model.config)
    adapter = fresh_adapter(outline, AdapterSettings(run.rank, 2 * run.rank), seed)
    random = torch.Generator().manual_seed(seed)
    tuned = {
        f"{name}.lora_B": 0.01 * torch.randn(b.shape, generator=random) for name, (_, b) in adapter.weights.items()
    }
    directory.mkdir()
    write_adapter(adapter, str(decode.directory if run.on_decode else base), tuned, directory)
    made = {"kind": "prefill_module", "base_fingerprint": files_fingerprint(base)}
    if run.on_decode:
        own = files_fingerprint(decode.directory)
        made |= {"prefill_weights": "decode", "prefill_weights_fingerprint": own}
    write_json(directory / MANIFEST, made | {"fingerprint": adapter_file(directory).fingerprint()})
    return directory


def _prompts(shared: SharedPrefill, run: AdapterRun) -> list[list[int]]:
    random = torch.Generator().manual_seed(0)
    drawn = torch.randint(shared.model.config.vocab_size, (run.count, run.prompt_tokens), generator=random)
    return drawn.tolist()


def _prefill_turns(shared: SharedPrefill, adapters: list[AdapterWeights], run: AdapterRun) -> dict[str, float]:
    prompts = _prompts(shared, run)

    def read(rows: list[AdapterWeights | None]) -> None:
        with shared.rows(rows):
            list(prefilled_rows(shared.model, prompts, _CHUNK_TOKENS))

    calls = {"prefill": lambda: read([*adapters]), "prefill_of_one_module": lambda: read([None] * run.count)}
    return _medians(calls, run.rounds, shared.device)


def _decode_turns(
    decode: DecodeModule, shared: SharedPrefill, adapters: list[AdapterWeights], run: AdapterRun
) -> dict[str, float]:
    """Time steps of two batches of equal shape: over the KV of the adapters, and over that of the base."""
    prompts, columns = _prompts(shared, run), run.prompt_tokens + run.steps + 2
    settings = Sampling(max_new_tokens=run.steps + 2, ignore_eos=True, detokenize=False)
    batches = {}
    for name, rows in (("decode", [*adapters]), ("decode_of_base", [None] * run.count)):
        batch = batches[name] = DecodeBatch(decode.model, budget_for(decode.model, run.count, columns))
        with shared.rows(rows):
            for number, layers in enumerate(prefilled_rows(shared.model, [p[:-1] for p in prompts], _CHUNK_TOKENS)):
                batch.add(DecodeRow(Request(str(number), name, tuple(prompts[number]), settings)), layers)
    return _medians({name: partial(take_step, batch) for name, batch in batches.items()}, run.steps, shared.device)


def _medians(calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Return the median seconds of each call, in turns; on a CPU, CPU seconds of this process."""
    turns = {name: partial(seconds_of, call, device, own=True) for name, call in calls.items()}
    taken = in_turns(turns, rounds, untimed=1, alternate=True)
    return {name: statistics.median(times) for name, times in taken.items()}


def _bytes(*models: Any) -> int:
    """Return the bytes of all tensors of models, those that they share once."""
    tensors = {t.data_ptr(): t for model in models for t in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def report_text(result: dict[str, Any]) -> str:
    """Return the result as lines for a terminal."""
    seconds = result["seconds"]
    return "\n".join(
        [
            f"{result['adapters']} adapters of rank {result['rank']} on {result['prefill_weights']} weights, "
            f"{result['dtype']}, prompts of {result['prompt_tokens']} tokens",
            f"prefill of one prompt each  {1000 * seconds['prefill']:9.1f} ms, one module for all "
            f"{1000 * seconds['prefill_of_one_module']:.1f} ms: {result['prefill_ratio']:.3f} x",
            f"decode step of all of them  {1000 * seconds['decode']:9.1f} ms, prompts read by the base "
            f"{1000 * seconds['decode_of_base']:.1f} ms: {result['decode_ratio']:.3f} x",
            f"to open and load one more   {1000 * seconds['load']:9.1f} ms",
            f"bytes of all weights        {result['bytes'] / 1e6:9.1f} MB, merged "
            f"{result['merged_bytes'] / 1e6:.1f} MB",
        ]
    )
