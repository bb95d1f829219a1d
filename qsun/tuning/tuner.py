"""Tuning a prefill module: the frozen decode module reads its KV cache, and gradients of the loss flow back through it.

prompt -> prefill module (trained) -> KV -> decode module (frozen, may be int4) -> cross-entropy of the response
"""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsun.data.examples import TokenExample
from qsun.errors import Diverged, QsunError
from qsun.memory import clear_out_of_memory, peak_rss_bytes, release_sometimes
from qsun.model.manifest import write_json
from qsun.model.output_dir import Workdir
from qsun.progress import Progress
from qsun.tuning.config import TuneConfig
from qsun.tuning.examples import Batches, cut_by_length, pieces, token_count
from qsun.tuning.job import LESS_MEMORY, TuneJob, prepare_tuning
from qsun.tuning.models import TuneModels, WholeModels, attention_over
from qsun.tuning.optimizer import learning_rate
from qsun.tuning.output import plot_losses, write_module
from qsun.tuning.processes import Processes
from qsun.tuning.run_state import RunState
from qsun.tuning.teacher import answer_prompts

_WRITTEN = "written"  # the record that the first process has written the module
_FLOAT16_TOKENS = 256  # a loss divided by more would have gradients of activations below float16's smallest values


def tune(  # noqa: PLR0913, PLR0917
    decode: str | Path,
    out: str | Path,
    data: str | Path | Sequence[str | Path],
    config: TuneConfig | None = None,
    base: str | Path | None = None,
    eval_data: str | Path | Sequence[str | Path] | None = None,
    init: str | Path | None = None,
    teacher: str | Path | None = None,
    device: str | torch.device | None = None,
    resume: bool = False,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Tune a prefill module against a frozen decode module, as `qsun tune` does.

    Args:
        decode: decode module, quantized or not: directory, hub id or "demo".
        out: directory to create; it appears only when it is complete.
        data: one or more files or data sets of prompt/response or chat rows (docs/calibration.md).
        config: default TuneConfig().
        base: full-precision base; default: the one that the decode module names, or the decode module itself.
        eval_data: validation data; default: a part of `data` is held out.
        init: a prefill module to start from instead of the base.
        teacher: a prefill module (with its decode module), a whole model or an ordinary adapter, to learn from.
        resume: continue an interrupted run with the same settings.
        progress: called with a label, the steps done and their total number.
    Returns:
        The report, as in report.json: train_loss and valid_loss as [step, loss], best_step, seconds_per_step and more.
    Raises:
        QsunError: invalid input, or a base that is not the decode module's.
    """
    return run_tuning(
        prepare_tuning(decode, out, data, config, base, eval_data, init, teacher, device, resume), resume, progress
    )


@clear_out_of_memory(instead=LESS_MEMORY)
def run_tuning(job: TuneJob, resume: bool = False, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Run a prepared job; see `tune`."""
    started, processes = time.perf_counter(), Processes.launched(job.device)
    job.check_memory(processes.count, processes.device)
    with _workdir(job, resume, processes) as work:
        job = answer_prompts(job, work, processes, progress)
        tuner = Tuner(job, work, processes)
        tuner.run(progress if processes.first else lambda *_: None)
        seconds = round(time.perf_counter() - started, 3)
        processes.wait()  # until all have written their share of the best weights
        report = tuner.report() | {"seconds": seconds, "peak_rss_bytes": peak_rss_bytes()}
        directory = work.module
        if processes.first:
            write_module(job, work, tuner.state.best(), tuner.models.adapter)
            work.note(_WRITTEN, {})
        # the first may publish before another has looked, which removes the record
        processes.wait_until(lambda: work.finished(_WRITTEN) or not work.module.exists())
        if processes.first or tuner.models.in_step:
            report["saved_valid_loss"] = tuner.loss_of_saved(directory)
            _check_saved(report)
        if processes.first:
            write_json(directory / "report.json", report)
            plot_losses(report, directory / "loss.png")
            work.publish()
        processes.wait_until(lambda: not work.module.exists())
    return report


def _models(job: TuneJob, processes: Processes) -> TuneModels:
    if not job.config.shard or processes.count == 1:
        return WholeModels(job, processes)
    from qsun.tuning.sharded import ShardedModels  # takes seconds to import

    return ShardedModels(job, processes)


def _check_saved(report: dict[str, Any]) -> None:
    """Raise QsunError if what was read back differs by more than the rounding to the base's dtype."""
    best, saved = report["best_valid_loss"], report["saved_valid_loss"]
    if not abs(saved - best) <= 0.02 + 0.05 * best:
        raise QsunError(f"reading back {report['out']}: validation loss {saved:.4f}, tuned to {best:.4f}; report this")


def _workdir(job: TuneJob, resume: bool, processes: Processes) -> Workdir:
    """Let the first process create the working directory once all have found its place free."""
    processes.wait()
    work = Workdir(job.out, job.settings(), resume) if processes.first else None
    if work is not None and work.finished(_WRITTEN):  # by a run that ended before it published
        work.drop(_WRITTEN)
    processes.wait()
    return work or Workdir(job.out, job.settings(), resume=True, lock=False)


class Tuner:
    """A run of tuning: the models, the optimizer, and the loss curve so far."""

    def __init__(self, job: TuneJob, work: Workdir, processes: Processes):
        self.job, self.processes = job, processes
        self.config = job.config
        self.models: TuneModels = _models(job, processes)
        self.optimizer = self.models.optimizer
        self.batches = Batches(job.train, self.config.batch_size, self.config.seed, self.config.group_by_length)
        self.step, self.seconds, self.tokens_per_second = 0, 0.0, 0.0
        self.train_loss: list[tuple[int, float]] = []
        self.valid_loss: list[tuple[int, float]] = []
        self.state = RunState(work, processes)
        self._restore()

    def run(self, progress: Progress) -> None:
        """Run the remaining steps; the state is saved at validations, but not every few seconds."""
        job = self.job
        every = self.config.eval_every or max(1, job.steps // 10)
        if not self.valid_loss:
            self._validate(progress)
            progress(self._label(), 0, job.steps)
        while self.step < job.steps:
            self.train_step()
            release_sometimes(self.step)
            if self.step % every == 0 or self.step == job.steps:
                self._validate(progress)
            progress(self._label(), self.step, job.steps)

    def train_step(self) -> None:
        """Take one optimizer step, on the next examples."""
        started = time.perf_counter()
        batch = self.batches.of_step(self.step)
        loss = self.gradients(batch)
        self._check_finite(loss, "training")
        rate = learning_rate(self.step, self.job.steps, self.job.peak_lr, self.config.warmup, self.config.min_lr)
        self.optimizer.step(rate, self.config.clip)
        self.step += 1
        seconds = time.perf_counter() - started
        self.seconds += seconds
        self.tokens_per_second = token_count(batch) / seconds
        self.train_loss.append((self.step, loss))

    def gradients(self, examples: Sequence[TokenExample]) -> float:
        """Compute gradients of the mean loss over all response tokens, and return that loss.

        They do not depend on how examples are split over processes and pieces.
        """
        tokens = sum(len(example.response) for example in examples)
        scale = _FLOAT16_TOKENS if self.job.dtype == torch.float16 else tokens
        total = torch.zeros((), dtype=torch.float64, device=self.processes.device)
        for piece in self._passes(examples):
            with attention_over(piece, self.processes.device):
                loss = self._loss(piece)
                if loss is not None:
                    total += loss.detach() / tokens
                    if loss.requires_grad:  # if all prompts have one token, nothing is prefilled
                        (loss / scale).backward()
            self.optimizer.take_gradients()
        self.optimizer.multiply_gradients(scale / tokens)
        self.processes.sum_([total])
        return float(total)

    def _passes(self, examples: Sequence[TokenExample]) -> list[Sequence[TokenExample]]:
        """Return this process's examples by pass, as many passes in every process."""
        found = list(pieces(examples, self.processes.rank, self.processes.count, self.config.grad_accum))
        if self.processes.count > 1 or self.processes.device.type != "cpu":  # on a GPU, few large passes are better
            return found
        return [part for piece in found for part in cut_by_length(piece)]

    def _loss(self, examples: Sequence[TokenExample]) -> Tensor | None:
        """Return the loss summed over response tokens; None if there is nothing to compute."""
        batch = self.models.batch(examples)
        return None if batch is None else self.models.loss(batch)

    @torch.no_grad()
    def mean_loss(self, examples: Sequence[TokenExample], tell: Callable[[int, int], None] = lambda *_: None) -> float:
        """Return the mean loss of a response token, over all processes.

        tell: called with the examples begun so far, and the tokens of those done in this process.
        """
        total = torch.zeros(2, dtype=torch.float64, device=self.processes.device)
        read = 0
        size = max(1, self.config.batch_size // self.config.grad_accum)
        mine = sorted(examples, key=lambda e: len(e.prompt))[self.processes.rank :: self.processes.count]
        for first in range(0, -(-len(examples) // self.processes.count), size):  # as many in every process
            tell(first * self.processes.count, read)
            piece = mine[first : first + size]
            read += token_count(piece)
            loss = self._loss(piece)
            if loss is not None:
                tokens = sum(len(example.response) for example in piece)
                total += torch.stack([loss.double(), total.new_tensor(tokens)])
        self.processes.sum_([total])
        return float(total[0] / total[1])

    def _check_finite(self, loss: float, kind: str) -> None:
        if not math.isfinite(loss):
            raise Diverged(
                f"the {kind} loss is {loss} after step {self.step} of {self.job.steps}; use a lower --lr than "
                f"{self.job.peak_lr:.2g}, or --dtype float32"
            )

    def _validate(self, progress: Progress) -> None:
        started = time.perf_counter()

        def tell(done: int, tokens: int) -> None:
            speed = f", {tokens / (time.perf_counter() - started):,.0f} tokens/s" if tokens else ""
            progress(f"validating, {done} of {len(self.job.valid)} examples{speed}", self.step, self.job.steps)

        loss = self.mean_loss(self.job.valid, tell)
        self._check_finite(loss, "validation")
        best = min((loss for _, loss in self.valid_loss), default=float("inf"))
        self.valid_loss.append((self.step, loss))
        if loss < best:
            self.state.keep_best(self.step, self.optimizer.tuned())
        if self.state.is_due():
            curve = {"step": self.step, "seconds": self.seconds, "train": self.train_loss, "valid": self.valid_loss}
            self.state.save(self.step, self.optimizer.state(), curve)

    def _label(self) -> str:
        valid = f"validation {self.valid_loss[-1][1]:.4f}"
        if not self.train_loss:
            return valid
        return f"loss {self.train_loss[-1][1]:.4f}, {self.tokens_per_second:,.0f} tokens/s, {valid}"

    def _restore(self) -> None:
        found = self.state.saved()
        if found is None:
            return
        tensors, curve = found
        self.optimizer.restore(tensors)
        self.step, self.seconds = curve["step"], curve["seconds"]
        self.train_loss = [(step, loss) for step, loss in curve["train"]]
        self.valid_loss = [(step, loss) for step, loss in curve["valid"]]

    def loss_of_saved(self, directory: Path) -> float:
        """Return the validation loss of the finished directory, loaded as a user would; releases what was tuned."""
        del self.optimizer
        self.models.read_back(directory)
        if not self.models.in_step:
            self.processes = Processes(self.processes.device)
        return self.mean_loss(self.job.valid)

    def report(self) -> dict[str, Any]:
        best_step, best = min(self.valid_loss, key=lambda point: point[1])
        job = self.job
        return {
            "out": str(job.out),
            "kind": job.kind,
            "base": job.names["base"],
            "decode": job.names["decode"],
            "teacher": job.names.get("teacher"),
            "config": job.config.to_dict(),
            "plan": job.plan(self.processes.count),
            "processes": self.processes.count,
            "tuned_weights": sum(p.numel() for p in self.optimizer.parameters.values()),
            "best_step": best_step,
            "best_valid_loss": best,
            "seconds_per_step": self.seconds / max(1, self.step),
            "train_loss": self.train_loss,
            "valid_loss": self.valid_loss,
        }
