"""The walk through a model's blocks: quantize each, keep its packed tensors, carry the hidden states on."""

import copy

import torch
from torch import Tensor, nn

from qsun.memory import release_freed
from qsun.model.checkpoint import Checkpoint
from qsun.model.formats import pack_layer
from qsun.model.output_dir import Workdir
from qsun.model.quantized import digest
from qsun.model.skeleton import HEAD, linear_of
from qsun.model.stored_layers import load_quantized_block
from qsun.progress import Progress
from qsun.quantization.activations import Batch, Stream, make_batches
from qsun.quantization.block import LayerResult, quantize_block, quantize_layer
from qsun.quantization.job import Job
from qsun.quantization.methods.moments import Moments
from qsun.quantization.prefill_streams import PrefillStream


class Steps:
    """Counts finished layers for the progress callback."""

    def __init__(self, job: Job, progress: Progress):
        self.total = sum(spec.quantized for spec in job.specs.values()) + 2
        self.count, self.progress = 0, progress

    def done(self, label: str, steps: int = 1) -> None:
        self.count += steps
        self.progress(label, self.count, self.total)


class Walk:
    """The streams of a job and its finished parts."""

    def __init__(self, job: Job, work: Workdir, steps: Steps):
        self.job, self.work, self.steps = job, work, steps
        self.stream: Stream | None = None
        self.full: Stream | None = None
        self.prefills: list[PrefillStream] = []
        if job.calibration is not None:
            batches = make_batches(job.calibration.samples, job.skeleton.device)
            hidden = job.skeleton.embed([batch.tokens for batch in batches])
            self.stream = Stream(job.skeleton, batches, hidden)
            reads_prompts = any(batch.module is None and batch.prefilled.any() for batch in batches)
            if job.config.method == "refined" or reads_prompts:
                self.full = Stream(job.skeleton, batches, list(hidden))
                self.stream.share_kv(self.full)
            self._read_prompts(batches)

    def _read_prompts(self, batches: list[Batch]) -> None:
        """Let both streams, the target of `refined` too, attend to what the prefill modules wrote."""
        for number, source in enumerate(self.job.prefill.modules):
            writer = PrefillStream(source.skeleton, number, batches)
            self.prefills.append(writer)
            for stream in (self.stream, self.full):
                if stream is not None:
                    stream.share_kv(writer, number)

    @staticmethod
    def part_name(index: int) -> str:
        return f"block-{index:05d}"

    @property
    def probe(self) -> tuple[Tensor, Tensor] | None:
        """Tokens of one batch and the quantized model's hidden states after the last block, for the read-back."""
        if self.stream is None or self.stream.batches[0].prefilled.any():
            return None
        return self.stream.batches[0].tokens, self.stream.hidden[0]

    def blocks(self) -> list[float | None]:
        """Quantize every block. Returns each block's error against the full-precision one, where that was tracked."""
        errors = []
        for index in range(len(self.job.skeleton.layers)):
            errors.append(self._block(index))
            release_freed()
        return errors

    def _block(self, index: int) -> float | None:
        skeleton, name = self.job.skeleton, self.part_name(index)
        for prefill in self.prefills:
            prefill.enter(index)
        original = skeleton.load_block(index)
        if self.full is not None:
            self.full.enter(index, original)
        if self.work.finished(name):
            record = self.work.record(name)
            self.steps.done(f"{name} (kept)", len(record["layers"]))
            block = self._kept_block(index)
            if self.stream is not None:
                self.stream.enter(index, block)
            self._leave()
            return record["block_error"]
        block = original if self.full is None else copy.deepcopy(original)
        if self.stream is not None:
            self.stream.enter(index, block)
        results = quantize_block(
            block,
            skeleton.prefix(index),
            self.job.config,
            self.job.scale_dtype,
            skeleton.architecture,
            self.stream,
            self.full,
            self.steps.done,
        )
        self._leave()
        error = self._block_error()
        self._keep(name, self._block_tensors(index, block, results), results, error)
        return error

    def _leave(self) -> None:
        if self.stream is not None:
            self.stream.leave()
        if self.full is not None:
            self.full.leave()

    def _kept_block(self, index: int) -> nn.Module:
        """A finished block as its part holds it."""
        part = Checkpoint.of_file(self.work.part(self.part_name(index)))
        return load_quantized_block(self.job.skeleton, part, index, self.job.config.format)

    def _block_tensors(self, index: int, block: nn.Module, results: dict[str, LayerResult]) -> dict[str, Tensor]:
        """What the file holds of a block: packed layers, and all else in the base's dtype."""
        prefix = self.job.skeleton.prefix(index)
        tensors = {}
        for name, tensor in block.state_dict().items():
            if (prefix + name).removesuffix(".weight") not in results:
                stored = self.job.checkpoint.dtype(prefix + name)
                tensors[prefix + name] = tensor if stored is None else tensor.to(stored)
        return tensors | self._packed(results)

    def _packed(self, results: dict[str, LayerResult]) -> dict[str, Tensor]:
        return {
            f"{name}.{suffix}": tensor
            for name, result in results.items()
            for suffix, tensor in pack_layer(
                result.weights.to(torch.device("cpu")), result.spec, self.job.config.format
            ).items()
        }

    def _keep(
        self, name: str, tensors: dict[str, Tensor], results: dict[str, LayerResult], error: float | None
    ) -> None:
        layers = [
            {
                "name": layer,
                "bits": result.spec.bits,
                "group_size": result.spec.group_size,
                "sym": result.spec.sym,
                "error": result.error,
            }
            for layer, result in results.items()
        ]
        digests = {layer: digest(result.weights) for layer, result in results.items()}
        self.work.write(name, tensors, {"layers": layers, "digests": digests, "block_error": error})

    def _block_error(self) -> float | None:
        """|quantized - full|^2 / |full|^2 of the hidden states after the block."""
        if self.stream is None or self.full is None:
            return None
        wrong = right = 0.0
        for ours, theirs, batch in zip(self.stream.hidden, self.full.hidden, self.stream.batches, strict=True):
            wrong += float((ours - theirs)[batch.counted].float().square().sum())
            right += float(theirs[batch.counted].float().square().sum())
        return wrong / max(right, 1e-30)

    def rest(self) -> None:
        """All that is outside the blocks; lm_head quantized where that was asked for."""
        job = self.job
        if self.work.finished("rest"):
            return
        names = [name for name in job.checkpoint.names() if not name.startswith("model.layers.")]
        results: dict[str, LayerResult] = {}
        if "lm_head" in job.specs and job.specs["lm_head"].quantized:
            results["lm_head"] = self._quantize_head()
            self.steps.done("lm_head")
        if job.skeleton.tied or results:
            names = [name for name in names if name != HEAD]
        self._keep("rest", job.checkpoint.load(names) | self._packed(results), results, None)

    def _quantize_head(self) -> LayerResult:
        job = self.job
        weight, moments = linear_of(job.skeleton.head(), "").weight.data, None
        if self.stream is not None:
            norm = job.skeleton.final_norm()
            moments = Moments.zeros(weight.shape[1], weight.device)
            for number, batch in enumerate(self.stream.batches):
                rows = batch.rows(norm(self.stream.hidden[number]))
                full = None if self.full is None else batch.rows(norm(self.full.hidden[number]))
                moments.add(rows, full)
        return quantize_layer(weight, moments, job.specs["lm_head"], job.config, job.scale_dtype, "lm_head")
