"""`qsun bench tasks`: what SUN, and then QSUN, cost in accuracy against full fine-tuning, on the embedded tasks.

    tune (SUN and full, by seed, task and budget) -> quantize (method, bits, calibration) -> align -> score -> report

Every step leaves a directory or a file and is skipped where that exists, so a study that was stopped goes on, and one
that is asked for more adds only what is missing.
"""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from qsun.config import QuantConfig
from qsun.demo.tasks import HARD_TASKS, TASKS, examples, write_jsonl
from qsun.errors import QsunError
from qsun.eval.harness.exact_match import exact_match
from qsun.model.manifest import write_json
from qsun.progress import Progress
from qsun.quantization.run import quantize
from qsun.runtime.decode_module import DecodeModule, load_decode
from qsun.runtime.prefill_module import load_prefill
from qsun.tuning.config import TuneConfig
from qsun.tuning.tuner import tune

GROUP_SIZE, SYM = 32, False
ALIGNED_METHOD = "refined"


@dataclass(frozen=True)
class Study:
    """What a study consists of; `steps` is the budget of SUN and of the full fine-tune alike.

    Attributes:
        seeds: 0 .. seeds - 1; each draws its own data, order and calibration.
        curve: smaller budgets, for accuracy against steps; complete runs of their own, first seed only.
        align_steps: further steps of each prefill module against a quantized decode module, and, as a control, against
            the full-precision one.
        lr, full_lr: peak rates of prefill modules and full fine-tunes, chosen on validation data.
    """

    seeds: int = 3
    steps: int = 1000
    curve: tuple[int, ...] = (125, 250, 500)
    align_steps: int = 250
    batch_size: int = 32
    lr: float = 3e-3
    full_lr: float = 3e-3
    train: int = 8192
    test: int = 500
    bits: tuple[int, ...] = (4, 3, 2)
    methods: tuple[str, ...] = ("rtn", "awq", "gptq", "refined")


@dataclass(frozen=True)
class Work:
    """One piece: `function(*arguments)` makes `result`, and may need what earlier stages made."""

    label: str
    result: Path
    function: Callable[..., None]
    arguments: tuple[Any, ...]


def run_study(study: Study, out: Path, processes: int = 2, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Do what is missing under `out` and return all scores.

    Returns:
        {"study": ..., "right": {seed: {task: {variant: "0110..."}}}}; a digit an example of the test set.
    Raises:
        QsunError: `out` holds a study with other settings.
    """
    _claim(study, out)
    stages = [
        [work for work in stage(study, out) if not work.result.exists()]
        for stage in (_tuning, _quantizing, _aligning, _scoring)
    ]
    total, done = sum(map(len, stages)), 0
    progress("", 0, total)
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for stage in stages:  # each needs what the one before it made
            jobs = {pool.submit(_alone, work): work for work in stage}
            for job in as_completed(jobs):
                if job.exception() is not None:  # now, not after all that waits
                    pool.shutdown(cancel_futures=True)
                job.result()
                done += 1
                progress(jobs[job].label, done, total)
    right = {
        str(seed): {task: json.loads(_scores(out, seed, task).read_text()) for task in tasks_of(seed)}
        for seed in range(study.seeds)
    }
    return {"study": asdict(study), "right": right}


def _claim(study: Study, out: Path) -> None:
    settings, file = json.loads(json.dumps(asdict(study))), out / "study.json"
    if file.exists():
        before = json.loads(file.read_text())
        for name, value in settings.items():
            if before.get(name) != value and name != "seeds":
                raise QsunError(
                    f"{out} holds a study with {name} {before.get(name)}, not {value}; choose another folder"
                )
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=1) + "\n")


def _alone(work: Work) -> None:
    torch.set_num_threads(1)  # the models are small: two processes are faster than two threads
    work.result.parent.mkdir(parents=True, exist_ok=True)
    work.function(*work.arguments)


def tasks_of(seed: int) -> tuple[str, ...]:
    """The served tasks, and with the first seed those that break a frozen decoder."""
    return TASKS + HARD_TASKS if seed == 0 else TASKS


def module(out: Path, seed: int, task: str, name: str) -> Path:
    """Where a tuned module lies: name is sun, full, sun-125, longer, aligned-int2 and so on."""
    return out / f"seed{seed}" / task / name


def decoder(out: Path, seed: int | None, method: str, bits: int) -> Path:
    """Where a decode module lies; seed None: calibrated with the packaged text, the same for all seeds."""
    return out / ("text" if seed is None else f"seed{seed}") / f"decode-{method}-int{bits}"


def _scores(out: Path, seed: int, task: str) -> Path:
    return out / f"seed{seed}" / task / "scores.json"


def _tuning(study: Study, out: Path) -> Iterator[Work]:
    for seed in range(study.seeds):
        for task in tasks_of(seed):
            budgets = {study.steps, *(study.curve if seed == 0 and task in TASKS else ())}
            for steps in sorted(budgets, reverse=True):
                for how in ("sun", "full"):
                    name = how if steps == study.steps else f"{how}-{steps}"
                    yield _tune_work(study, out, seed, task, name, steps, how == "full")


def _tune_work(
    study: Study,
    out: Path,
    seed: int,
    task: str,
    name: str,
    steps: int,
    full: bool = False,
    decode: str | Path = "demo",
    init: Path | None = None,
) -> Work:
    config = TuneConfig(
        steps=steps,
        batch_size=study.batch_size,
        lr=study.full_lr if full else study.lr,
        seed=seed,
        baseline="full" if full else "none",
    )
    target = module(out, seed, task, name)
    return Work(f"{task} {name}, seed {seed}", target, _tune, (decode, target, task, study.train, config, init))


def _tune(decode: str | Path, out: Path, task: str, train: int, config: TuneConfig, init: Path | None) -> None:
    files = [
        _data(out.parents[1], task, split, count, config.seed) for split, count in (("train", train), ("valid", 300))
    ]
    tune(decode, out, files[0], config, eval_data=files[1], device="cpu", init=init, resume=_begun(out))


def _begun(out: Path) -> bool:
    return out.with_name(out.name + ".partial").exists()


def _data(folder: Path, task: str, split: str, count: int, seed: int) -> Path:
    file = folder / f"{task}-{split}.jsonl"
    if not file.exists():
        draft = file.with_suffix(f".{os.getpid()}")  # two processes may want it at once
        write_jsonl(draft, examples(task, split, count, seed))
        draft.rename(file)
    return file


def _quantizing(study: Study, out: Path) -> Iterator[Work]:
    for bits in study.bits:
        for method in study.methods:
            places = [None] if method == "rtn" else [None, *range(study.seeds)]  # rtn looks at no data
            for seed in places:
                target = decoder(out, seed, method, bits)
                kind = "text" if seed is None else f"decode positions, seed {seed}"
                yield Work(f"{method} int{bits}, {kind}", target, _quantize, (out, target, method, bits, seed))


def _quantize(out: Path, target: Path, method: str, bits: int, seed: int | None) -> None:
    chosen = {"method": method, "bits": bits, "group_size": GROUP_SIZE, "sym": SYM, "seed": seed or 0}
    config = QuantConfig.from_dict(chosen)
    calibration, modules = None, []
    if seed is not None:
        calibration = [out / f"seed{seed}" / f"{task}-train.jsonl" for task in TASKS]
        modules = [module(out, seed, task, "sun") for task in TASKS]
    quantize("demo", target, config, calibration, device="cpu", resume=_begun(target), calibration_prefill=modules)


def _aligning(study: Study, out: Path) -> Iterator[Work]:
    for seed in range(study.seeds):
        for task in TASKS:
            start = module(out, seed, task, "sun")
            yield _tune_work(study, out, seed, task, "longer", study.align_steps, init=start)
            for bits in study.bits:
                decode = decoder(out, seed, ALIGNED_METHOD, bits)
                name = f"aligned-int{bits}"
                yield _tune_work(study, out, seed, task, name, study.align_steps, decode=decode, init=start)


def _scoring(study: Study, out: Path) -> Iterator[Work]:
    for seed in range(study.seeds):
        for task in tasks_of(seed):
            yield Work(f"answers: {task}, seed {seed}", _scores(out, seed, task), _score, (study, out, seed, task))


def _score(study: Study, out: Path, seed: int, task: str) -> None:
    test = examples(task, "test", study.test, seed)
    right = {}
    for variant, prefill, decode in variants(study, out, seed, task):
        reader = load_prefill(prefill, dtype="float32", device="cpu")
        if decode is None:
            writer = DecodeModule(reader.model, reader.directory, reader.manifest)
        else:
            writer = load_decode(decode, "cpu", "float32")
        score = exact_match(task, test, reader, writer)
        right[variant] = "".join("01"[answer] for answer in score.right)
    write_json(_scores(out, seed, task), right)


def variants(study: Study, out: Path, seed: int, task: str) -> Iterator[tuple[str, str | Path, str | Path | None]]:
    """(name, prefill module, decode module) of all that is compared; no decode module: the tuned model itself."""
    sun = module(out, seed, task, "sun")
    yield "base", "demo", "demo"
    yield "full", module(out, seed, task, "full"), None
    yield "sun", sun, "demo"
    if task in HARD_TASKS:
        return
    for steps in study.curve if seed == 0 else ():
        yield f"full-{steps}", module(out, seed, task, f"full-{steps}"), None
        yield f"sun-{steps}", module(out, seed, task, f"sun-{steps}"), "demo"
    for bits in study.bits:
        for method in study.methods:
            yield f"int{bits} {method} text", sun, decoder(out, None, method, bits)
            if method != "rtn":
                yield f"int{bits} {method} decode", sun, decoder(out, seed, method, bits)
        aligned = module(out, seed, task, f"aligned-int{bits}")
        yield f"int{bits} {ALIGNED_METHOD} aligned", aligned, decoder(out, seed, ALIGNED_METHOD, bits)
    yield "sun longer", module(out, seed, task, "longer"), "demo"
