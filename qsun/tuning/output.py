"""A tuned module on disk: a Hugging Face directory or a LoRA adapter, with its qsun.json and the loss curve."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qsun.figure import new_figure, save_figure
from qsun.model.checkpoint import Checkpoint, file_sha256, read_json
from qsun.model.lora import Adapter, write_adapter
from qsun.model.manifest import MANIFEST, MANIFEST_VERSION, copy_base_files, read_manifest, versions, write_json
from qsun.model.output_dir import ShardWriter, Workdir, lay_out
from qsun.model.pairing import ADAPTER_WEIGHTS
from qsun.model.skeleton import EMBEDDING, HEAD, config_json
from qsun.tuning.job import TuneJob


def write_module(job: TuneJob, work: Workdir, tuned: Mapping[str, Tensor], adapter: Adapter | None) -> Path:
    """Write all files except the report. Weights that were not tuned are those of the start, byte for byte.

    Args:
        tuned: the best weights by parameter name; each is read once.
        adapter: as it was at the start, if one was tuned.
    """
    directory = work.clear()
    if adapter is not None:
        write_adapter(adapter, job.names["decode" if job.start.on_decode else "base"], tuned, directory)
        weights = Checkpoint(directory / ADAPTER_WEIGHTS)
    else:
        _write_weights(job, tuned, directory)
        _write_config(job.base, directory)
        weights = Checkpoint(directory)
    copy_base_files(job.base, directory)
    fingerprint = weights.fingerprint()
    (directory / "README.md").write_text(_card(job), encoding="utf-8")
    write_json(directory / MANIFEST, _manifest(job, fingerprint, directory))
    return directory


def _write_config(base: Path, directory: Path) -> None:
    """Copy config.json byte for byte, unless the model is the text model of another, or its head is not tied."""
    config = config_json(base)
    if config == read_json(base / "config.json"):
        shutil.copyfile(base / "config.json", directory / "config.json")
    else:
        write_json(directory / "config.json", config)


def _write_weights(job: TuneJob, tuned: Mapping[str, Tensor], directory: Path) -> None:
    """Write weights in the start's dtypes and names, one block at a time."""
    source = Checkpoint(job.start.directory)
    tied = bool(config_json(job.base).get("tie_word_embeddings"))
    names = [name for name in source.names() if not (tied and name == HEAD and EMBEDDING in source)]
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(".".join(name.split(".")[:3]), []).append(name)
    parts = [{name: (source.headers[name]["dtype"], source.shape(name)) for name in group} for group in groups.values()]
    writer = ShardWriter(directory, lay_out(parts))
    for group in groups.values():
        stored = source.load(group)
        writer.write({name: tuned[name].to(old.dtype) if name in tuned else old for name, old in stored.items()})


def _manifest(job: TuneJob, fingerprint: str, directory: Path) -> dict[str, Any]:
    """Return qsun.json of a prefill module, or of a conventional fine-tune; pairing.py reads it."""
    fine_tune = job.config.fine_tune
    retuned = job.start.directory != job.base
    before = read_manifest(job.start.directory) if retuned else {}
    lineage = [job.fingerprints["start"], *before.get("lineage", [])] if retuned else []
    on = "decode" if job.start.on_decode else "base"
    under = {"prefill_weights": on, "prefill_weights_fingerprint": job.fingerprints[on]} if job.tunes_adapter else {}
    files = sorted(p for p in directory.iterdir() if p.is_file() and p.name != MANIFEST)
    return {
        "qsun_manifest": MANIFEST_VERSION,
        "kind": "fine_tune" if fine_tune else "prefill_module",
        "base": job.names["base"],
        "base_fingerprint": job.fingerprints["base"],
        "fingerprint": fingerprint,
        "lineage": lineage,
        **under,
        "decode": None if fine_tune else job.names["decode"],
        "decode_fingerprint": None if fine_tune else job.fingerprints["decode"],
        "data": job.names["data"],
        **({"teacher": job.names["teacher"]} if job.teacher is not None else {}),
        "config": job.config.to_dict(),
        "versions": versions(),
        "sha256": {path.name: file_sha256(path) for path in files},
    }


def _card(job: TuneJob) -> str:
    base, decode = job.names["base"], job.names["decode"]
    library = "peft" if job.tunes_adapter else "transformers"
    head = f"---\nbase_model: {base}\nlibrary_name: {library}\ntags: [qsun, sun]\n---\n"
    if job.config.fine_tune:
        return f"{head}# {base}: {job.kind}\n\nMade by `qsun tune --baseline full`, to compare with.\n"
    return f"""{head}# {base}: prefill module

A prefill module of SUN (arXiv 2603.02599), tuned by [qsun](https://pypi.org/project/qsun/) against the frozen decode
module `{decode}`. It writes the KV cache of a prompt; the decode module produces every token of the answer. It is not
useful as a model by itself.

```python
import qsun

decode = qsun.load_decode("{decode}")
prefill = qsun.load_prefill("PATH", decode)
print(qsun.generate(prefill, decode, ["..."]))
```
"""


def plot_losses(report: dict[str, Any], path: Path) -> None:
    """Draw training and validation loss by step, and mark the best checkpoint."""
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    axes.plot(*zip(*report["train_loss"], strict=True), linewidth=0.8, alpha=0.6, label="training, by batch")
    axes.plot(*zip(*report["valid_loss"], strict=True), marker="o", markersize=3.5, linewidth=1.4, label="validation")
    best = report["best_step"]
    axes.axvline(best, color="black", linestyle="--", linewidth=1, label=f"kept: step {best}")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss of a response token, nats")
    losses = [loss for _, loss in (*report["train_loss"], *report["valid_loss"])]
    axes.set_yscale("log" if min(losses) > 0 else "linear")  # of a module that starts as its teacher, it is 0
    axes.set_title(f"{report['kind']} on {report['base']}: validation {report['best_valid_loss']:.4f}")
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=8)
    save_figure(figure, path)
