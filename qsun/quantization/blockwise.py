"""Quantize a model block by block: each is quantized and written, and its output is what the next one reads."""

import copy
from dataclasses import asdict
from typing import Any

from torch import Tensor

from qsun.memory import release_freed
from qsun.model.checkpoint import Checkpoint
from qsun.model.formats import pack_layer
from qsun.model.output_dir import ShardWriter, Workdir
from qsun.model.quantized import digest
from qsun.model.skeleton import linear_of
from qsun.model.stored_layers import load_quantized_block
from qsun.progress import Progress
from qsun.quantization.activations import Activations, Batch, make_batches
from qsun.quantization.block import LayerResult, quantize_block, quantize_layers
from qsun.quantization.job import Job
from qsun.quantization.methods.moments import Moments, squared_norm
from qsun.quantization.plan import REST, block_part
from qsun.quantization.prefill_activations import PrefillActivations

_PROBE_TOKENS = 512


class ProgressCounter:
    """Counts finished layers, and steps of polish, for the progress callback."""

    def __init__(self, job: Job, progress: Progress):
        self.total = sum(spec.quantized for spec in job.specs.values()) + job.config.polish + 2
        self.count, self.progress = 0, progress

    def done(self, label: str, steps: int = 1) -> None:
        self.count += steps
        self.progress(label, self.count, self.total)


class BlockwiseQuantizer:
    """The activations of a job, and the output that its blocks are written to."""

    def __init__(self, job: Job, work: Workdir, counter: ProgressCounter):
        self.job, self.work, self.counter = job, work, counter
        self.writer = ShardWriter(work.module, job.shards)
        self.written = Checkpoint(work.module)
        self.ours: Activations | None = None
        self.reference: Activations | None = None
        self.prefills: list[PrefillActivations] = []
        if job.calibration is not None:
            batches = make_batches(job.calibration.samples, job.skeleton.device)
            hidden = job.skeleton.embed([batch.tokens for batch in batches])
            self.ours = Activations(job.skeleton, batches, hidden)
            base_reads = any(batch.module is None and batch.prefilled.any() for batch in batches)
            if job.config.method == "refined" or base_reads:
                self.reference = Activations(job.skeleton, batches, list(hidden))
                self.ours.attend_to(self.reference)
            self._read_prompts(batches)

    def _read_prompts(self, batches: list[Batch]) -> None:
        """Let both activations, the target of `refined` too, attend to the KV of the prefill modules."""
        for number, module in enumerate(self.job.prefill.modules):
            source = PrefillActivations(module.skeleton, number, batches)
            self.prefills.append(source)
            for activations in self._both():
                activations.attend_to(source, number)

    def _both(self) -> list[Activations]:
        return [activations for activations in (self.ours, self.reference) if activations is not None]

    @property
    def probe(self) -> tuple[Tensor, Tensor] | None:
        """Tokens of a few samples and the quantized model's hidden states after the last block, for the read-back."""
        if self.ours is None or self.ours.batches[0].prefilled.any():
            return None
        tokens = self.ours.batches[0].tokens
        rows = max(1, _PROBE_TOKENS // tokens.shape[1])
        return tokens[:rows], self.ours.hidden[0][:rows]

    def run(self) -> None:
        """Quantize every block, then what is outside of them."""
        for index in range(len(self.job.skeleton.layers)):
            self._block(index)
            release_freed()
        self._rest()

    def records(self) -> list[dict[str, Any]]:
        """Return what was recorded of each part: its layers, their digests, and the error of the block."""
        return [self.work.record(name) for name in self.job.parts]

    def _block(self, index: int) -> None:
        for prefill in self.prefills:
            prefill.run_block(index)
        original = self.job.skeleton.load_block(index)
        if self.reference is not None:
            self.reference.start_block(index, original)
        name = block_part(index)
        if self.work.finished(name):
            self._finished_block(index)
            self.counter.done(f"{name} (kept)", len(self.work.record(name)["layers"]))
            return
        block = original if self.reference is None else copy.deepcopy(original)
        if self.ours is not None:
            self.ours.start_block(index, block)
        results, folded = quantize_block(self.job, index, block, self.ours, self.reference, self.counter.done)
        for activations in self._both():
            activations.finish_block()
        self._keep(name, results, folded, self._block_error())

    def _finished_block(self, index: int) -> None:
        """Carry the hidden states through a block as an interrupted run has written it."""
        if self.ours is not None:
            block = load_quantized_block(self.job.skeleton, self.written, index, self.job.config.format)
            self.ours.start_block(index, block)
        for activations in self._both():
            activations.finish_block()

    def _keep(
        self, part: str, results: dict[str, LayerResult], folded: dict[str, Tensor], error: float | None = None
    ) -> None:
        """Write a part, packed layers in their format, folded tensors and all else from the base, then its record."""
        checkpoint, fmt = self.job.checkpoint, self.job.config.format
        stored = folded | checkpoint.load(self.job.parts[part].keys() & checkpoint.files.keys() - folded.keys())
        for name, result in results.items():
            packed = pack_layer(result.weights, result.spec, fmt)
            stored |= {f"{name}.{suffix}": tensor for suffix, tensor in packed.items()}
        self.writer.write(stored)
        layers = [{"name": name, **asdict(result.spec), "error": result.error} for name, result in results.items()]
        digests = {name: digest(result.weights) for name, result in results.items()}
        self.work.note(part, {"layers": layers, "digests": digests, "block_error": error})

    def _block_error(self) -> float | None:
        """Return |quantized - reference|^2 / |reference|^2 of the hidden states after the block."""
        if self.ours is None or self.reference is None:
            return None
        wrong = right = 0.0
        for ours, reference, batch in zip(self.ours.hidden, self.reference.hidden, self.ours.batches, strict=True):
            wrong += squared_norm((ours - reference)[batch.counted])
            right += squared_norm(reference[batch.counted])
        return wrong / max(right, 1e-30)

    def _rest(self) -> None:
        """Write all that is outside the blocks; lm_head quantized if that was asked for."""
        job, results = self.job, {}
        if self.work.finished(REST):
            return
        if "lm_head" in job.specs:
            results["lm_head"] = self._quantize_head()
            self.counter.done("lm_head")
        self._keep(REST, results, {})

    def _quantize_head(self) -> LayerResult:
        job = self.job
        weight, moments = linear_of(job.skeleton.head(), "").weight.data, None
        if self.ours is not None:
            norm = job.skeleton.final_norm()
            moments = Moments.zeros(weight.shape[1], weight.device)
            for number, batch in enumerate(self.ours.batches):
                rows = batch.rows(norm(self.ours.hidden[number]))
                target = self.reference if job.config.method == "refined" else None
                moments.add(rows, None if target is None else batch.rows(norm(target.hidden[number])))
        return quantize_layers([weight], moments, job.specs["lm_head"], job.config, job.scale_dtype, "lm_head")[0]
