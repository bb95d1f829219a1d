"""The last steps of a run: the files beside the weights, and reading everything back before it counts as done."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsun.errors import QsunError
from qsun.memory import release_freed
from qsun.model.checkpoint import Checkpoint
from qsun.model.manifest import MANIFEST, copy_base_files, decode_manifest, model_card, write_json
from qsun.model.quantization_config import engines_for, make_quantization_config
from qsun.model.quantized import digest
from qsun.model.skeleton import config_json, linear_of
from qsun.model.stored_layers import bits_per_weight, load_quantized_block, quantized_layer_names, read_quantized_layer
from qsun.quantization.job import Job


def write_configuration(job: Job, directory: Path) -> None:
    """Write config.json, with which the module can be loaded."""
    quantization = make_quantization_config(job.config, job.specs)
    base_config = config_json(job.checkpoint.directory)
    if job.config.lm_head:
        base_config["tie_word_embeddings"] = False
    write_json(directory / "config.json", base_config | {"quantization_config": quantization})
    if job.config.format == "gptq":
        write_json(directory / "quantize_config.json", quantization)  # where auto-gptq looks


def write_module_files(
    job: Job,
    directory: Path,
    layers: list[dict[str, Any]],
    fingerprints: dict[str, str | None],
    prefill_modules: list[dict[str, str]],
) -> dict[str, Any]:
    """Write tokenizer, card and qsun.json. Returns what the report says about the module."""
    quantization = make_quantization_config(job.config, job.specs)
    copy_base_files(job.checkpoint.directory, directory)
    engines = engines_for(job.config.format, quantization, job.specs, job.skeleton.tied and not job.config.lm_head)
    density = bits_per_weight(Checkpoint(directory), job.skeleton.linear_shapes(job.config.lm_head))
    source = "none" if job.calibration is None else job.calibration.source
    if prefill_modules:
        source = ", ".join(f"{entry['calibration']} (prompts read by {entry['name']})" for entry in prefill_modules)
    card = model_card(job.config, job.name, density, engines, source)
    (directory / "README.md").write_text(card, encoding="utf-8")
    write_json(
        directory / MANIFEST, decode_manifest(job.config, job.name, fingerprints, layers, directory, prefill_modules)
    )
    return {
        "base": job.name,
        "config": job.config.to_dict(),
        "bits_per_weight": density,
        "engines": engines,
        "layers": layers,
        "calibration": None
        if job.calibration is None
        else {
            "source": job.calibration.source,
            "samples": len(job.calibration.samples),
            "decode_tokens": job.calibration.decode_tokens,
            "fingerprint": job.calibration.fingerprint,
            "prefill_modules": prefill_modules,
        },
    }


def read_back(job: Job, directory: Path, digests: dict[str, str], probe: tuple[Tensor, Tensor] | None) -> None:
    """Check the finished directory against what was computed.

    Every layer's integers are unpacked and compared by digest; and, where there is calibration data, one batch runs
    through the blocks as the files hold them and must end in the hidden states that quantization ended in.

    Raises:
        QsunError: a difference. The directory is then not published.
    """
    checkpoint = Checkpoint(directory)
    found = quantized_layer_names(checkpoint)
    if found != sorted(digests):
        raise QsunError(f"reading back {directory}: {len(found)} quantized layers where {len(digests)} were written")
    for name in found:
        features = linear_of(job.skeleton.model, name).in_features
        weights, _ = read_quantized_layer(checkpoint, name, job.config.format, features, job.skeleton.device)
        if digest(weights) != digests[name]:
            raise QsunError(f"reading back {directory}: {name} differs from what was computed; is the disk faulty?")
        del weights
        release_freed()
    if probe is None:
        return
    tokens, expected = probe
    hidden = job.skeleton.embed([tokens])[0]
    for index in range(len(job.skeleton.layers)):
        block = load_quantized_block(job.skeleton, checkpoint, index, job.config.format)
        output: Any = block(hidden, **job.skeleton.block_arguments(index, hidden))
        hidden = output[0] if isinstance(output, tuple) else output
    scale = expected.float().abs().max().clamp(min=1e-6)
    difference = float((hidden.float() - expected.float()).abs().max() / scale)
    if not difference <= 16 * torch.finfo(hidden.dtype).eps:
        raise QsunError(f"reading back {directory}: the hidden states differ by {difference:.2g}; please report this")
