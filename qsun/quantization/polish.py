"""A last stage: the scales of all layers learn together to give the full-precision module's next-token distributions.

A pass quantizes one layer after another, each for its own output. What counts is the distribution of the next token,
at the positions that a decode module sees and on the KV of the prefill modules that it will serve. Integers and zero
points stay; scales are multiplied by 1 + gain, and Adam minimizes KL(full precision || quantized) over the calibration
samples, through the whole model. EfficientQAT (arXiv 2407.11062, section 3.3) trains scales end to end as well, on
cross-entropy. Every eighth sample is held out, of the passes too, and the scales that were best on those are kept: the
first ones where learning did not help.
"""

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from qsun.errors import QsunError
from qsun.memory import release_freed, release_sometimes
from qsun.model.architectures import BLOCKS
from qsun.model.checkpoint import Checkpoint
from qsun.model.formats import pack_layer
from qsun.model.output_dir import ShardWriter, Workdir
from qsun.model.quantized import digest
from qsun.model.skeleton import linear_of
from qsun.model.stored_layers import read_quantized_layer
from qsun.quantization.job import Job
from qsun.quantization.lessons import make_lessons, teach
from qsun.quantization.scaled_linear import learn_scales
from qsun.runtime.decode_module import load_decode

_PART, _STATE = "polish", "polish-step-"
_PEAK_RATE = 0.01  # of gains at 2 bits; each further bit halves it, and from this depth * width on, more of either
_SMALL = 1536
_HARM = 1.1  # of the divergence at the start; the first steps, of which rounding leaves little, may cost some
_WARMUP, _CHECKS = 0.05, 8  # share of the steps; validations
_MOMENTS = ("exp_avg", "exp_avg_sq")


def polish_scales(job: Job, work: Workdir, tell: Callable[[int], None]) -> tuple[dict[str, str], dict[str, Any]]:
    """Learn the scales of a finished module and write them to it. An interrupted stage goes on.

    Args:
        work: its module has config.json and all weights.
        tell: called with the number of steps that were taken since the last call.
    Returns:
        The digests of the layers that changed, by name; and what the report says: divergence, [step, nats a token of
        the held-out samples], kept, the step whose scales were written, and slower, by how much the rate was lowered.
    Raises:
        QsunError: NaN or Inf, or a module that is read back as another one.
    """
    learner = _Learner(job, work, tell)
    if work.finished(_PART):
        tell(job.config.polish)
    else:
        learner.run()
    record = work.record(_PART)
    digests = _write(job, work, load_file(work.part(_PART)))
    learner.check_saved(record)
    return digests, record


class _Learner:
    """The lessons, and what was learned so far: the curve and the best scales."""

    def __init__(self, job: Job, work: Workdir, tell: Callable[[int], None]):
        assert job.calibration is not None  # QuantConfig asks for a method that has one
        self.job, self.work, self.tell, self.steps = job, work, tell, job.config.polish
        self.held_out, self.lessons = make_lessons(job.calibration.held_out), make_lessons(job.calibration.samples)
        prefills = [module.name for module in job.prefill.modules]
        self.teacher = teach(job.skeleton, prefills, [*self.held_out, *self.lessons])
        self.curve: list[tuple[int, float]] = []
        self.best: dict[str, Tensor] = {}  # gains
        self.slower = 1.0  # than the first peak rate

    def run(self) -> None:
        """Take the remaining steps; the state is kept at each validation."""
        self.decode = self._load()
        self.layers = learn_scales(self.decode, self.job.scale_dtype, BLOCKS)
        config = self.job.skeleton.config
        peak = _PEAK_RATE * min(1.0, _SMALL / (config.num_hidden_layers * config.hidden_size))
        peaks = {layer.gains: peak / 2 ** (layer.bits - 2) for layer in self.layers.values()}
        groups = [{"params": [gains], "peak": peak} for gains, peak in peaks.items()]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        every = max(1, self.steps // _CHECKS)
        done = self._restore()
        self.tell(done)
        if not self.curve:
            self._validate(0)
        for step in range(done + 1, self.steps + 1):
            self._step(step)
            release_sometimes(step)
            if step % every == 0 or step == self.steps:
                self._validate(step)
            self.tell(1)
        kept = min(self.curve, key=lambda point: point[1])[0]
        for name, layer in self.layers.items():
            layer.gains.data.copy_(self.best[name])
        # the first scales stay as they are stored, which the computation's dtype may not hold
        learned = {name: layer.scales.detach() for name, layer in self.layers.items()} if kept else {}
        record = {"steps": self.steps, "divergence": self.curve, "kept": kept, "slower": self.slower}
        self.work.write(_PART, learned, record)
        del self.decode, self.layers, self.optimizer
        release_freed()

    def check_saved(self, record: dict[str, Any]) -> None:
        """Raise QsunError if the module on disk is not what was learned."""
        saved, best = self._divergence(self._load()), min(value for _, value in record["divergence"])
        if not abs(saved - best) <= 0.002 + 0.05 * best:
            raise QsunError(f"reading back {self.job.out}: divergence {saved:.5f}, learned to {best:.5f}; report this")

    def _load(self) -> Any:
        skeleton = self.job.skeleton
        return load_decode(self.work.module, skeleton.device, skeleton.dtype, False, merge=False, fuse=False).model

    @torch.enable_grad()
    def _step(self, step: int) -> None:
        epoch, place = divmod(step - 1, len(self.lessons))
        order = random.Random(f"{self.job.config.seed} {epoch}").sample(self.lessons, len(self.lessons))
        rate = min(1.0, step / max(1, _WARMUP * self.steps)) * (1 + math.cos(math.pi * (step - 1) / self.steps)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate / self.slower
        lesson = order[place]
        loss = lesson.loss(self.decode, self.teacher) / lesson.tokens
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def _divergence(self, decode: Any) -> float:
        """Return KL(full precision || decode) of the held-out samples, nats a token."""
        total = sum(float(lesson.loss(decode, self.teacher)) for lesson in self.held_out)
        found = total / sum(lesson.tokens for lesson in self.held_out)
        if not math.isfinite(found):
            raise QsunError("polish: NaN or Inf in the quantized model's logits; try --dtype float32")
        return found

    def _validate(self, step: int) -> None:
        """Measure and keep the state; where it has clearly done harm, go back to the best one, and on more slowly."""
        found, first = self._divergence(self.decode), not self.curve
        if first or found < min(value for _, value in self.curve):
            self.best = {name: layer.gains.detach().clone() for name, layer in self.layers.items()}
        elif found > _HARM * self.curve[0][1]:
            self.slower *= 3
            self.optimizer.state.clear()
            for name, layer in self.layers.items():
                layer.gains.data.copy_(self.best[name])
        self.curve.append((step, found))
        self._save(step)

    def _save(self, step: int) -> None:
        before = self.work.names(_STATE)
        tensors = {f"best.{name}": gains for name, gains in self.best.items()}
        for name, layer in self.layers.items():
            moments = self.optimizer.state.get(layer.gains, {})
            kept = {"gains": layer.gains.detach()} | {key: moments[key] for key in _MOMENTS if key in moments}
            tensors |= {f"{key}.{name}": tensor for key, tensor in kept.items()}
        adam_steps = [int(state["step"]) for state in self.optimizer.state.values()]
        record = {"curve": self.curve, "slower": self.slower, "adam_steps": adam_steps[0] if adam_steps else 0}
        self.work.write(f"{_STATE}{step:06d}", tensors, record)
        for name in before:
            self.work.drop(name)

    def _restore(self) -> int:
        """Take up the state of an interrupted stage. Returns the steps that it took."""
        found = self.work.names(_STATE)
        if not found:
            return 0
        record = self.work.record(found[-1])
        self.curve, self.slower = [(step, value) for step, value in record["curve"]], record["slower"]
        tensors = {key: t.to(self.job.skeleton.device) for key, t in load_file(self.work.part(found[-1])).items()}
        self.best = {name: tensors[f"best.{name}"] for name in self.layers}
        for name, layer in self.layers.items():
            layer.gains.data.copy_(tensors[f"gains.{name}"])
            if record["adam_steps"]:
                moments = {key: tensors[f"{key}.{name}"] for key in _MOMENTS}
                self.optimizer.state[layer.gains] = moments | {"step": torch.tensor(float(record["adam_steps"]))}
        return self.curve[-1][0]


def _write(job: Job, work: Workdir, scales: dict[str, Tensor]) -> dict[str, str]:
    """Write these scales of layers to the module. Returns the layers' digests."""
    written, writer, digests = Checkpoint(work.module), ShardWriter(work.module, job.shards), {}
    for name, learned in scales.items():
        features = linear_of(job.skeleton.model, name).in_features
        weights = read_quantized_layer(written, name, job.config.format, features)[0]._replace(scales=learned)
        packed = pack_layer(weights, job.specs[name], job.config.format)
        writer.write({f"{name}.{suffix}": tensor for suffix, tensor in packed.items()})
        digests[name] = digest(weights)
    return digests
