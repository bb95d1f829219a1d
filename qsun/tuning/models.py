"""The two modules of a tuning run, whole in each process; sharded.py spreads them over all processes."""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from qsun.data.examples import TokenExample
from qsun.model.lora import Adapter, place_adapter, read_adapter
from qsun.runtime.decode_module import load_decode
from qsun.runtime.logits import response_loss
from qsun.runtime.prefill_module import load_prefill
from qsun.runtime.quant_linear import QuantLinear
from qsun.runtime.seam import SeamBatch, collate, monolithic_hidden, seam_hidden
from qsun.tuning.checkpointing import recomputed
from qsun.tuning.job import TuneJob
from qsun.tuning.optimizer import Optimizer, used_parameters
from qsun.tuning.processes import Processes
from qsun.tuning.teacher import load_teacher

_SHORT = 256  # tokens of a text; above, the fused attention's lower memory counts


class TuneModels(Protocol):
    """What the tuner needs from the modules, however their weights are held.

    Attributes:
        adapter: its first weights, if an adapter is tuned.
        optimizer: of the weights that are tuned.
        in_step: all processes must run the same number of passes, since they exchange weights in each.
    """

    adapter: Adapter | None
    optimizer: Optimizer
    in_step: bool

    def batch(self, examples: Sequence[TokenExample]) -> SeamBatch | None:
        """Put the examples side by side; None if there is nothing to compute."""
        ...

    def loss(self, batch: SeamBatch) -> Tensor:
        """Return the loss summed over response tokens: of the pair, or of a fine-tune alone."""
        ...

    def read_back(self, directory: Path) -> None:
        """Release what was tuned and load a finished directory in its place."""
        ...


class WholeModels:
    """Each process holds all weights of both modules. See `TuneModels`."""

    in_step = False

    def __init__(self, job: TuneJob, processes: Processes):
        self.job, self.processes = job, processes
        self.model: Any = load_decode(job.start.weights, processes.device, job.dtype, merge=False, fuse=False).model
        self.decode = self.model
        if job.one_copy:
            self.decode = _with_the_same_layers(self.model)
        elif not job.config.fine_tune:
            self.decode = load_decode(job.decode, processes.device, job.dtype).model
        self.adapter = make_trainable(self.model, job)
        self.model.eval()  # no dropout: the module writes KV as it does when it serves
        self.teacher = None if job.teacher is None else load_teacher(job.teacher, processes.device, job.dtype)
        self.optimizer: Optimizer = Optimizer(self.model, job.config.weight_decay, processes)

    def batch(self, examples: Sequence[TokenExample]) -> SeamBatch | None:
        return collate(examples).to(self.processes.device) if examples else None

    def loss(self, batch: SeamBatch) -> Tensor:
        recompute = self.job.config.grad_checkpoint and torch.is_grad_enabled()
        with recomputed(*{self.model, self.decode}) if recompute else nullcontext():
            if self.job.config.fine_tune:
                hidden = monolithic_hidden(self.model, batch)
            else:
                hidden = seam_hidden(self.model, self.decode, batch)
        reader = self.model if self.job.config.fine_tune else self.decode
        taught = None if self.teacher is None else self.teacher.states(batch)
        return response_loss(reader, hidden, batch.labels, taught, self.job.config.teacher_weight)

    def read_back(self, directory: Path) -> None:
        del self.optimizer, self.model
        if self.job.one_copy:  # merged, the adapter would need a second copy of the weights, which may not fit
            self.model = _with_the_same_layers(self.decode)
            read_adapter(self.model, directory)
            return
        if self.job.config.fine_tune:
            del self.decode  # the same module
        self.model = load_prefill(directory, dtype=self.job.dtype, device=self.processes.device).model
        if self.job.config.fine_tune:
            self.decode = self.model


def attention_over(examples: Sequence[TokenExample], device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which a CPU computes short attention as products: the fused backward pass is slower there."""
    short = all(len(e.prompt) + len(e.response) <= _SHORT for e in examples)
    return sdpa_kernel(SDPBackend.MATH) if short and device.type == "cpu" else nullcontext()


def _with_the_same_layers(model: Any) -> Any:
    """Return a copy of a frozen model that shares its linear layers and embedding, so that weights are held once."""
    shared = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Embedding, QuantLinear))]
    return copy.deepcopy(model, {id(module): module for module in shared})


def make_trainable(model: Any, job: TuneJob) -> Adapter | None:
    """Let those parameters require gradients that the job tunes. Returns the adapter that it put on the model, if any.

    model: may be on the meta device.
    """
    adapter = job.first_adapter(model)
    model.requires_grad_(adapter is None)
    if adapter is not None:
        place_adapter(model, adapter)
    if not job.config.fine_tune:
        used = used_parameters(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name in used)
    return adapter
