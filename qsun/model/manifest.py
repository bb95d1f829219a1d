"""The files beside the weights: qsun.json, those copied from the base, config.json, the model card."""

import json
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qsun.config import QuantConfig
from qsun.model.checkpoint import file_sha256, read_json

MANIFEST = "qsun.json"
MANIFEST_VERSION = 1
_BASE_FILES = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.model",
    "*.tiktoken",
    "LICENSE*",
)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file completely or not at all, through a draft beside it."""
    draft = path.with_name(path.name + ".draft")
    draft.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(path)


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read qsun.json; empty if there is none."""
    return read_json(directory / MANIFEST) if (directory / MANIFEST).exists() else {}


def check_base_files(base: Path) -> None:
    """Raise QsunError for a file that would be copied and that no loader could read."""
    for path in {path for pattern in _BASE_FILES for path in base.glob(pattern)}:
        if path.suffix == ".json":
            read_json(path)


def copy_base_files(base: Path, directory: Path) -> list[str]:
    """Copy tokenizer and generation files, byte for byte. Returns their names."""
    names = sorted({path.name for pattern in _BASE_FILES for path in base.glob(pattern) if path.is_file()})
    for name in names:
        shutil.copyfile(base / name, directory / name)
    return names


def versions(*more: str) -> dict[str, str]:
    """Return the versions of the packages that decide the result; more: further ones."""
    found = {"python": platform.python_version()}
    for package in ("qsun", "torch", "transformers", "safetensors", *more):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def decode_manifest(
    config: QuantConfig,
    base: str,
    fingerprints: dict[str, str | None],
    layers: list[dict[str, Any]],
    directory: Path,
    prefill_modules: list[dict[str, str]],
) -> dict[str, Any]:
    """Return qsun.json: what made this module, its errors, and the SHA-256 of every file that a loader reads.

    prefill_modules: name, fingerprint and calibration source of each one whose KV was calibrated with.
    """
    files = sorted(p for p in directory.iterdir() if p.is_file() and p.name != MANIFEST)
    return {
        "qsun_manifest": MANIFEST_VERSION,
        "kind": "decode_module",
        "base": base,
        "base_fingerprint": fingerprints["base"],
        "calibration_fingerprint": fingerprints["calibration"],
        "prefill_modules": prefill_modules,
        "config": config.to_dict(),
        "versions": versions(),
        "layers": layers,
        "sha256": {path.name: file_sha256(path) for path in files},
    }


def model_card(config: QuantConfig, base: str, bits_per_weight: float, engines: dict[str, str], source: str) -> str:
    """Return README.md of a decode module."""
    rows = "\n".join(f"| {name} | {answer} |" for name, answer in engines.items())
    kind = "symmetric" if config.sym else "asymmetric"
    return f"""---
base_model: {base}
library_name: transformers
tags: [qsun, sun, {config.format}, int{config.bits}]
---
# {base}: {config.bits}-bit decode module

The shared, frozen decode module of SUN (arXiv 2603.02599), quantized by [qsun](https://pypi.org/project/qsun/) with
`{config.method}`: {config.bits} bits, group size {config.group_size}, {kind}, {bits_per_weight:.3f} bits a weight.
Calibration: {source}. It works by itself as a causal language model, and as the decode module of any prefill module
that was tuned on the same base.

| engine | loads it |
|---|---|
{rows}

```python
import qsun

decode = qsun.load_decode("PATH")
logits = decode.model(input_ids).logits
```

`qsun.json` holds the settings, fingerprints and the error of every layer; `report.json` and `errors.png` show them.
"""
