"""The pieces of work of a study, stage by stage: tuning, quantizing, aligning, scoring."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsun.device import default_device, load_dtype
from qsun.errors import QsunError
from qsun.eval.harness.exact_match import score_examples
from qsun.eval.study.study import Study
from qsun.eval.study.task import StudyTask, read_test
from qsun.model.locate import find_model, load_tokenizer
from qsun.model.manifest import write_json
from qsun.model.output_dir import partial_path
from qsun.model.skeleton import read_model_config
from qsun.quantization.run import quantize
from qsun.runtime.decode_module import DecodeModule, load_decode
from qsun.runtime.prefill_module import load_prefill
from qsun.tuning.config import TuneConfig
from qsun.tuning.tuner import tune


@dataclass(frozen=True)
class Work:
    """A piece of work: `function(*arguments)` makes `result`, and may need what earlier stages made."""

    label: str
    result: Path
    function: Callable[..., None]
    arguments: tuple[Any, ...]


def check_tasks(study: Study) -> None:
    """Raise QsunError, before work starts, for a base without tokenizer, a missing scorer or unusable test data."""
    directory = find_model(study.base)
    tokenizer = load_tokenizer(directory)
    if tokenizer is None:
        raise QsunError(f"base {study.base} has no tokenizer, and tasks are text")
    for task in study.tasks:
        task.find_scorer()
        if not task.embedded:
            read_test(Path(task.test), tokenizer, read_model_config(directory).max_position_embeddings, study.test)


def tuning(study: Study, out: Path) -> Iterator[Work]:
    """SUN and the full fine-tune of each task and seed, with every budget."""
    for seed in range(study.seeds):
        for task in study.tasks_of(seed):
            budgets = {study.steps, *(study.curve if seed == 0 and not task.hard else ())}
            for steps in sorted(budgets, reverse=True):
                for how in ("sun", "full"):
                    name = how if steps == study.steps else f"{how}-{steps}"
                    yield _tune_work(study, out, seed, task, name, steps)


def _tune_work(
    study: Study,
    out: Path,
    seed: int,
    task: StudyTask,
    name: str,
    steps: int,
    decode: str | Path = "",
    init: Path | None = None,
) -> Work:
    config = study.tune_config(steps, seed, name.startswith("full"))
    target = study.module(out, seed, task.name, name)
    arguments = (study, decode or study.base, target, task, config, init)
    return Work(f"{task.name} {name}, seed {seed}", target, _tune, arguments)


def _tune(study: Study, decode: str | Path, out: Path, task: StudyTask, config: TuneConfig, init: Path | None) -> None:
    folder = out.parents[1]
    train, valid = (
        task.data(folder, split, count, config.seed) for split, count in (("train", study.train), ("valid", 300))
    )
    tune(decode, out, train, config, eval_data=valid, device=study.device, init=init, resume=partial_path(out).exists())


def quantizing(study: Study, out: Path) -> Iterator[Work]:
    """Decode modules by bits, method and calibration."""
    for bits in study.bits:
        for method in study.methods:
            places = [None] if method == "rtn" else [None, *range(study.seeds)]  # rtn uses no data
            for seed in places:
                target = study.decoder(out, seed, method, bits)
                kind = "text" if seed is None else f"decode positions, seed {seed}"
                yield Work(f"{method} int{bits}, {kind}", target, _quantize, (study, out, target, method, bits, seed))


def _quantize(study: Study, out: Path, target: Path, method: str, bits: int, seed: int | None) -> None:
    config = study.quant_config(method, bits, seed or 0)
    calibration, modules = None, []
    if seed is not None:
        folder = out / f"seed{seed}"
        calibration = [task.data(folder, "train", study.train, seed) for task in study.tasks if not task.hard]
        modules = [study.module(out, seed, name, "sun") for name in study.served()]
    quantize(
        study.base,
        target,
        config,
        calibration,
        device=study.device,
        resume=partial_path(target).exists(),
        calibration_prefill=modules,
    )


def aligning(study: Study, out: Path) -> Iterator[Work]:
    """Prefill modules tuned further against each quantized decode module and, as a control, against the base."""
    for seed in range(study.seeds):
        for task in study.tasks:
            if task.hard:
                continue
            start = study.module(out, seed, task.name, "sun")
            yield _tune_work(study, out, seed, task, "longer", study.align_steps, init=start)
            for bits in study.bits:
                decode = study.decoder(out, seed, study.aligned_method, bits)
                yield _tune_work(study, out, seed, task, f"aligned-int{bits}", study.align_steps, decode, start)


def scoring(study: Study, out: Path) -> Iterator[Work]:
    """The answers of all variants to each task's test set."""
    for seed in range(study.seeds):
        for task in study.tasks_of(seed):
            target = study.scores(out, seed, task.name)
            yield Work(f"answers: {task.name}, seed {seed}", target, _score, (study, out, seed, task))


def _score(study: Study, out: Path, seed: int, task: StudyTask) -> None:
    directory, device = find_model(study.base), default_device(study.device)
    dtype, positions = load_dtype(study.dtype, device), read_model_config(directory).max_position_embeddings
    file = task.data(out / f"seed{seed}", "test", study.test, seed)
    test = read_test(file, load_tokenizer(directory), positions, study.test)
    right = {}
    for variant, prefill, decode in variants(study, out, seed, task):
        reader = load_prefill(prefill, dtype=dtype, device=device)
        if decode is None:
            writer = DecodeModule(reader.model, reader.directory, reader.manifest)
        else:
            writer = load_decode(decode, device, dtype)
        score = score_examples(test, task.find_scorer(), reader, writer)
        right[variant] = "".join("01"[answer] for answer in score.right)
    write_json(study.scores(out, seed, task.name), right)


def variants(
    study: Study, out: Path, seed: int, task: StudyTask
) -> Iterator[tuple[str, str | Path, str | Path | None]]:
    """Yield (name, prefill module, decode module) of everything compared; no decode module: the tuned model itself."""

    def module(name: str) -> Path:
        return study.module(out, seed, task.name, name)

    yield "base", study.base, study.base
    yield "full", module("full"), None
    yield "sun", module("sun"), study.base
    if task.hard:
        return
    for steps in study.curve if seed == 0 else ():
        yield f"full-{steps}", module(f"full-{steps}"), None
        yield f"sun-{steps}", module(f"sun-{steps}"), study.base
    for bits in study.bits:
        for method in study.methods:
            yield f"int{bits} {method} text", module("sun"), study.decoder(out, None, method, bits)
            if method != "rtn":
                yield f"int{bits} {method} decode", module("sun"), study.decoder(out, seed, method, bits)
        aligned, decoder = module(f"aligned-int{bits}"), study.decoder(out, seed, study.aligned_method, bits)
        yield f"int{bits} {study.aligned_method} aligned", aligned, decoder
    yield "sun longer", module("longer"), study.base


STAGES = (tuning, quantizing, aligning, scoring)
