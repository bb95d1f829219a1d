"""The pieces of work of a study, stage by stage: tuning, quantizing, aligning, scoring."""

from collections.abc import Callable, Iterator
from pathlib import Path

from qsun.device import default_device, load_dtype
from qsun.errors import Diverged
from qsun.eval.harness.exact_match import score_examples
from qsun.eval.study.modules import (
    Tuned,
    after_adapters,
    after_quantizing,
    before_quantizing,
    chosen_rate,
    note_diverged,
    trials,
)
from qsun.eval.study.study import Study
from qsun.eval.study.task import EMBEDDED_TEST, StudyTask, read_test
from qsun.eval.study.work import Work
from qsun.model.locate import find_model, load_tokenizer
from qsun.model.manifest import write_json
from qsun.model.output_dir import partial_path
from qsun.model.pairing import on_decode_weights
from qsun.model.skeleton import read_model_config
from qsun.quantization.run import quantize
from qsun.runtime.decode_module import DecodeModule, load_decode
from qsun.runtime.prefill_module import load_prefill
from qsun.tuning.tuner import tune


def trying(study: Study, out: Path) -> Iterator[Work]:
    """Each rate that is tried, for each kind of module of each task."""
    for task in study.tasks:
        for module in trials(study, task.hard):
            yield _tune_work(study, out, study.first_seed, task, module)


def tuning(study: Study, out: Path) -> Iterator[Work]:
    """SUN, the full fine-tune, and the adapters of both, of each task and seed."""
    for seed in study.all_seeds:
        for task in study.tasks_of(seed):
            for module in before_quantizing(study, seed, task.hard):
                yield _tune_work(study, out, seed, task, module)


def aligning(study: Study, out: Path) -> Iterator[Work]:
    """Prefill modules tuned against each quantized decode module, and the control."""
    return _served(study, out, after_quantizing)


def distilling(study: Study, out: Path) -> Iterator[Work]:
    """What starts from the adapters of earlier stages."""
    return _served(study, out, after_adapters)


def _served(study: Study, out: Path, modules: Callable[[Study], Iterator[Tuned]]) -> Iterator[Work]:
    for seed in study.all_seeds:
        for task in study.tasks:
            for module in () if task.hard else modules(study):
                yield _tune_work(study, out, seed, task, module)


def _tune_work(study: Study, out: Path, seed: int, task: StudyTask, module: Tuned) -> Work:
    def place(name: str, seed: int = seed) -> Path:
        return study.module(out, seed, task.name, name)

    needs = [place(name) for name in (module.init, module.teacher) if name]
    if module.bits:
        needs.append(study.decoder(out, seed, study.aligned_method, module.bits))
    needs += [place(trial.name, study.first_seed) for trial in _trials_of(study, task, module)]
    label, arguments = f"{task.name} {module.name}, seed {seed}", (study, out, seed, task, module)
    return Work(label, place(module.name), _tune, arguments, module.steps, tuple(needs))


def _trials_of(study: Study, task: StudyTask, module: Tuned) -> list[Tuned]:
    """Return the trials that a module takes its rate from; a trial has its own."""
    return [] if module.rate else [trial for trial in trials(study, task.hard) if trial.kind == module.kind]


def _tune(study: Study, out: Path, seed: int, task: StudyTask, module: Tuned) -> None:
    def place(name: str) -> Path | None:
        return study.module(out, seed, task.name, name) if name else None

    target, folder = study.module(out, seed, task.name, module.name), out / f"seed{seed}"
    decode = study.decoder(out, seed, study.aligned_method, module.bits) if module.bits else study.base
    chosen = chosen_rate(study, out, task.name, module.kind) if _trials_of(study, task, module) else 0.0
    train, valid = (
        task.data(folder, *split, seed) for split in (("train", study.train), ("valid", max(300, study.valid)))
    )
    try:
        tune(
            decode,
            target,
            train,
            module.config(study, seed, chosen),
            eval_data=valid,
            init=place(module.init),
            teacher=place(module.teacher),
            device=study.device,
            resume=partial_path(target).exists(),
        )
    except Diverged:
        if not module.rate:
            raise
        note_diverged(target)


def quantizing(study: Study, out: Path) -> Iterator[Work]:
    """Decode modules by bits, method and calibration."""
    for bits in study.bits:
        for method in study.methods:
            text = [None] if study.text or method == "rtn" else []
            places = text if method == "rtn" else [*text, *study.all_seeds]  # rtn uses no data
            for seed in places:
                target, modules = study.decoder(out, seed, method, bits), _served_suns(study, out, seed)
                kind = "text" if seed is None else f"decode positions, seed {seed}"
                arguments = (study, out, target, method, bits, seed)
                yield Work(f"{method} int{bits}, {kind}", target, _quantize, arguments, needs=tuple(modules))


def _served_suns(study: Study, out: Path, seed: int | None) -> list[Path]:
    """Return the prefill modules that decode modules of a seed are calibrated behind; seed None: text, so none."""
    return [] if seed is None else [study.module(out, seed, name, "sun") for name in study.served()]


def _quantize(study: Study, out: Path, target: Path, method: str, bits: int, seed: int | None) -> None:
    config = study.quant_config(method, bits, seed or 0)
    calibration = None
    if seed is not None:
        folder = out / f"seed{seed}"
        calibration = [task.data(folder, "train", study.train, seed) for task in study.tasks if not task.hard]
    quantize(
        study.base,
        target,
        config,
        calibration,
        device=study.device,
        resume=partial_path(target).exists(),
        calibration_prefill=_served_suns(study, out, seed),
    )


def scoring(study: Study, out: Path) -> Iterator[Work]:
    """The answers of each variant to each task's test set."""
    for seed in study.all_seeds:
        for task in study.tasks_of(seed):
            for variant, prefill, decode in variants(study, out, seed, task):
                target = study.answers(out, seed, task.name, variant)
                needs = tuple(Path(module) for module in (prefill, decode) if module)
                arguments = (study, out, seed, task, target, prefill, decode)
                yield Work(f"answers: {task.name}, {variant}, seed {seed}", target, _score, arguments, needs=needs)


def _score(
    study: Study, out: Path, seed: int, task: StudyTask, target: Path, prefill: str | Path, decode: str | Path | None
) -> None:
    directory, device = find_model(study.base), default_device(study.device)
    dtype, positions = load_dtype(study.dtype, device), read_model_config(directory).max_position_embeddings
    file = task.data(out / f"seed{seed}", "test", study.test or EMBEDDED_TEST, seed)
    test, _ = read_test(file, load_tokenizer(directory), positions, study.test)
    if decode is None:
        reader = load_prefill(prefill, dtype=dtype, device=device)
        writer = DecodeModule(reader.model, reader.directory, reader.manifest)
    else:
        writer = load_decode(decode, device, dtype)
        own = on_decode_weights(find_model(str(prefill)))  # then it is merged into the weights of this decode module
        reader = load_prefill(prefill, writer if own else None, dtype, device)
    score = score_examples(test, task.find_scorer(), reader, writer)
    write_json(target, "".join("01"[answer] for answer in score.right))


def variants(
    study: Study, out: Path, seed: int, task: StudyTask
) -> Iterator[tuple[str, str | Path, str | Path | None]]:
    """Yield (name, prefill module, decode module) of everything compared; no decode module: the tuned model itself."""

    def module(name: str) -> Path:
        return study.module(out, seed, task.name, name)

    further = bool(study.align_steps)
    yield "base", study.base, study.base
    yield "full", module("full"), None
    yield "sun", module("sun"), study.base
    if task.hard:
        return
    for steps in study.curve if seed == study.first_seed else ():
        yield f"full-{steps}", module(f"full-{steps}"), None
        yield f"sun-{steps}", module(f"sun-{steps}"), study.base
    for rank in study.lora_ranks:
        yield f"full lora{rank}", module(f"full-lora{rank}"), None
        yield f"sun lora{rank}", module(f"lora{rank}"), study.base
        if further and study.distill:
            yield f"sun lora{rank} distilled", module(f"lora{rank}-distilled"), study.base
    for bits in study.bits:
        for method in study.methods:
            if study.text or method == "rtn":
                yield f"int{bits} {method} text", module("sun"), study.decoder(out, None, method, bits)
            if method != "rtn":
                yield f"int{bits} {method} decode", module("sun"), study.decoder(out, seed, method, bits)
        yield from _tuned_against(study, module, bits, study.decoder(out, seed, study.aligned_method, bits))
    if further:
        yield "sun longer", module("longer"), study.base


def _tuned_against(
    study: Study, module: Callable[[str], Path], bits: int, decoder: Path
) -> Iterator[tuple[str, Path, Path]]:
    name, further = f"int{bits} {study.aligned_method}", bool(study.align_steps)
    if further:
        yield f"{name} aligned", module(f"aligned-int{bits}"), decoder
    if further and study.distill:
        yield f"{name} distilled", module(f"distilled-int{bits}"), decoder
    for rank in study.lora_ranks:
        yield f"{name} lora{rank}", module(f"lora{rank}"), decoder
        yield f"{name} lora{rank} on its weights", module(f"lora{rank}-on-int{bits}"), decoder
        if further and study.distill:
            yield f"{name} lora{rank} on its weights, distilled", module(f"lora{rank}-on-int{bits}-distilled"), decoder


STAGES = (trying, tuning, quantizing, aligning, distilling, scoring)
