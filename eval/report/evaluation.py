"""`qsun eval`: every variant answers every task, part by part, so that a stopped run can be resumed.

variants x tasks -> lm-eval -> right or wrong, example by example
variants with responses -> divergence from the full-precision decoder at decode positions
decode modules with text -> the same on running text, and perplexity
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qsun.data.examples import TokenExample
from qsun.data.jsonl import check_no_pipe
from qsun.device import default_device
from qsun.errors import QsunError
from qsun.eval.harness.divergence import read_windows, response_divergence, text_divergence
from qsun.eval.harness.run import HarnessSettings, check_tasks, run_task
from qsun.eval.output.machine import describe_machine
from qsun.eval.report.loaded_modules import LoadedModules
from qsun.eval.report.variants import Entry, Matrix, stored_bits
from qsun.eval.speed.contenders import loaded_contenders, made_contenders
from qsun.eval.speed.decode_speed import Points, bench_speed
from qsun.eval.speed.model_shapes import known_shape
from qsun.model.checkpoint import file_sha256, read_json
from qsun.model.locate import find_model, load_tokenizer
from qsun.model.manifest import read_manifest, write_json
from qsun.model.pairing import weights_fingerprint
from qsun.model.skeleton import read_model_config
from qsun.progress import Progress
from qsun.tuning.examples import read_examples


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate and how.

    Attributes:
        matrix: variants and tasks. harness: settings for lm-eval.
        text: running text for perplexity and divergence of every decode module. windows: how many, and their length.
        responses: prompt/response data for every entry without its own.
        dtype, device: of all modules; auto is float32 on a CPU and the stored dtype on a GPU.
    """

    matrix: Matrix
    harness: HarnessSettings = field(default_factory=HarnessSettings)
    text: Path | None = None
    windows: tuple[int, int] = (64, 256)
    responses: Path | None = None
    dtype: str = "auto"
    device: str = ""

    def place(self) -> torch.device:
        return default_device(self.device)

    def source(self, entry: Entry) -> str:
        """Return the entry's data of prompts and responses, its own or that of all; may be empty."""
        return entry.responses or str(self.responses or "")

    def settings(self) -> dict[str, Any]:
        """Return what a resumed run must agree with."""
        return json.loads(json.dumps(asdict(self), default=str))


@dataclass(frozen=True)
class _EvaluationPart:
    """A piece of work whose result is one file."""

    label: str
    name: str
    make: Callable[[LoadedModules], Mapping[str, Any]]


def evaluate(
    job: Evaluation, out: Path, resume: bool = False, progress: Progress = lambda *_: None
) -> list[dict[str, Any]]:
    """Run all parts that have no result in `out`/parts.

    Returns:
        Each part's result: {"kind": "task" | "responses" | "text", "variant", ...}.
    Raises:
        QsunError: an unknown task, too little text, unusable responses, or `out` exists (without resume) or holds
            another evaluation.
    """
    check_tasks([task for entry in job.matrix.entries for task in entry.answers(job.matrix.tasks)], job.harness)
    _check_free(out, resume)
    _check_data(job)
    parts = list(_parts(job))
    _claim(job, out, resume)
    modules = LoadedModules(job.place(), job.dtype)
    results = []
    for number, part in enumerate(parts):
        progress(part.label, number, len(parts))
        file = out / "parts" / f"{part.name}.json"
        if not file.exists():
            write_json(file, dict(part.make(modules)))
        results.append(json.loads(file.read_text(encoding="utf-8")))
    _check_metrics(results)
    progress("done", len(parts), len(parts))
    return results


def _check_metrics(results: Sequence[Mapping[str, Any]]) -> None:
    """Raise QsunError where two variants' shares of one task are not of the same metric: they cannot be compared."""
    first: dict[str, Mapping[str, Any]] = {}
    for part in results:
        other = first.setdefault(part["task"], part) if part["kind"] == "task" else part
        if other.get("metric") != part.get("metric"):
            raise QsunError(
                f"task {part['task']} gives {other['metric']} for {other['variant']}, and {part['metric']} for "
                f"{part['variant']}; evaluate it for each of them alone"
            )


def _check_data(job: Evaluation) -> None:
    """Raise QsunError, now and not hours later, for a missing base, and for text and responses that cannot be read."""
    for file in _sources(job):
        check_no_pipe(file, "evaluation")  # each variant reads it
    bases = {str(entry.full_precision()[0]) for entry in _compared(job)}
    if job.text:
        for base in bases:
            read_windows(job.text, base, *job.windows)
    read = {(entry.decode, source): entry for entry in job.matrix.entries if (source := job.source(entry))}
    for (_, source), entry in read.items():
        _examples(entry, source)


def _sources(job: Evaluation) -> list[Path]:
    """Return the text and the responses, each once."""
    responses = [Path(source) for entry in job.matrix.entries if (source := job.source(entry))]
    return list(dict.fromkeys([*([job.text] if job.text else []), *responses]))


def _compared(job: Evaluation) -> list[Entry]:
    """Return entries whose decode module is compared with its base, at decode positions or on text."""
    return [entry for entry in job.matrix.entries if job.text or job.source(entry)]


def _check_free(out: Path, resume: bool) -> None:
    goes_on = resume and (out / "evaluation.json").exists()
    if not goes_on and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise QsunError(f"output directory {out} exists; choose another, or continue with --resume")


def _claim(job: Evaluation, out: Path, resume: bool) -> None:
    file = out / "evaluation.json"
    if file.exists() and resume:
        before = json.loads(file.read_text(encoding="utf-8"))
        for name, value in job.settings().items():
            if before.get(name) != value:
                raise QsunError(f"{out} was started with another {name}; give the same settings, or another -o")
        kept = before.get("contents", {})
        for name, digest in _contents(job).items():
            if kept.get(name) != digest:
                raise QsunError(f"{name} has changed since {out} was started; choose another -o, or restore it")
        return
    contents = _contents(job)
    (out / "parts").mkdir(parents=True)
    write_json(file, job.settings() | {"contents": contents})


def _contents(job: Evaluation) -> dict[str, str]:
    """Return SHA-256 digests of all modules' weights and of the data files, by name: a path may get new content."""
    entries, compared = job.matrix.entries, _compared(job)
    names = [name for entry in entries for name in (entry.prefill, entry.decode)]
    names += [entry.full_precision()[1] for entry in compared]
    digests: dict[Path, str] = {}
    found = {}
    for name in dict.fromkeys(names):
        directory = find_model(name).resolve()
        if directory not in digests:
            digests[directory] = weights_fingerprint(directory)
        found[f"module {name}"] = digests[directory]
    for source in _sources(job):
        if source.is_file():  # and not a data set
            found[f"file {source}"] = file_sha256(source)
    return found


def _parts(job: Evaluation) -> Iterator[_EvaluationPart]:
    for place, entry in enumerate(job.matrix.entries):
        for task in entry.answers(job.matrix.tasks):
            yield _EvaluationPart(f"{entry.name}: {task}", f"{place:03d}-{task}", partial(_task, job, entry, task))
        source = job.source(entry)
        if source:
            work = partial(_responses, entry, source)
            yield _EvaluationPart(f"{entry.name}: decode positions", f"{place:03d}-responses", work)
    if job.text:
        for place, (entry, names) in enumerate(_decoders(job.matrix)):
            part = partial(_text, job, job.text, entry, names)
            yield _EvaluationPart(f"{', '.join(names)}: text", f"text-{place:03d}", part)


def _decoders(matrix: Matrix) -> list[tuple[Entry, list[str]]]:
    """Return an entry of each decode module with the variants that use it, without fine-tunes that do both."""
    found: dict[tuple[str, Path], tuple[Entry, list[str]]] = {}
    for entry in matrix.entries:
        if read_manifest(find_model(entry.decode)).get("kind") != "fine_tune":
            _, names = found.setdefault((entry.decode, entry.full_precision()[0]), (entry, []))
            names += [entry.name] if entry.name not in names else []
    return list(found.values())


def _task(job: Evaluation, entry: Entry, task: str, modules: LoadedModules) -> Mapping[str, Any]:
    prefill, decode = modules.pair(entry)
    found = run_task(prefill, decode, task, job.harness)
    return {"kind": "task", "variant": entry.name, "task": task, **found}


def _examples(entry: Entry, source: str) -> list[TokenExample]:
    """Read prompts and responses that fit into the entry's modules. Raises QsunError for what cannot be used."""
    directory = find_model(entry.decode)
    tokenizer = load_tokenizer(directory) or load_tokenizer(entry.full_precision()[0])
    if tokenizer is None:
        raise QsunError(f"decode module {entry.decode} has no tokenizer; copy the tokenizer files of its base into it")
    return read_examples([source], tokenizer, read_model_config(directory).max_position_embeddings, "evaluation")[0]


def _responses(entry: Entry, source: str, modules: LoadedModules) -> Mapping[str, Any]:
    prefill, decode = modules.pair(entry)
    examples = _examples(entry, source)
    found = response_divergence(prefill.model, decode.model, modules.reference(entry).model, examples)
    return {"kind": "responses", "variant": entry.name, "source": source, **asdict(found)}


def _text(job: Evaluation, source: Path, entry: Entry, names: list[str], modules: LoadedModules) -> Mapping[str, Any]:
    module, reference = modules.decoder(entry.decode), modules.reference(entry)
    windows = read_windows(source, str(entry.full_precision()[0]), *job.windows).to(modules.device)
    found = text_divergence(module.model, reference.model, windows)
    return {"kind": "text", "variants": names, "decode": entry.decode, "source": str(source), **asdict(found)}


def check_speed(what: str, job: Evaluation) -> None:
    """Raise QsunError, before work starts, for what `measured_speed` cannot do."""
    if what.endswith(".json"):
        found = read_json(Path(what)) if Path(what).is_file() else {}
        if "rows" not in found or "model" not in found:
            raise QsunError(f"{what} is not a speed.json of `qsun bench speed`")
    elif what == "modules":
        quantized = _quantized(job)
        if quantized is None:
            raise QsunError("--speed modules needs a quantized decode module; give one, or a known shape")
        quantized.full_precision()
    else:
        known_shape(what)


def _quantized(job: Evaluation) -> Entry | None:
    return next((entry for entry in job.matrix.entries if stored_bits(entry.decode)), None)


def measured_speed(what: str, job: Evaluation, note: Callable[[str], None]) -> dict[str, Any]:
    """Return a result of `qsun bench speed` for a report.

    Args:
        what: a speed.json; a known shape, for random weights; or "modules": the first quantized decode module.
    Raises:
        QsunError: none of these, or no quantized module to time.
    """
    if what.endswith(".json"):
        return read_json(Path(what))  # checked by check_speed
    device = job.place()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # memory of the parts before would count as used
    quantized = _quantized(job) if what == "modules" else None
    if quantized:
        contenders = loaded_contenders(quantized.decode, quantized.full_precision()[1], device)
    else:
        contenders = made_contenders(what, "both", device)
    limit = contenders.prefill.config.max_position_embeddings
    contexts = [c for c in (128, 1024) if c + 64 < limit]
    result = bench_speed(contenders, Points([1, 4, 16, 64], contexts, 32, 60.0), note)
    return result | describe_machine(device)
