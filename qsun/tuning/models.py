"""The two modules of a tuning run, whole in this process; sharded.py has those that are spread over all processes."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qsun.model.lora import ADAPTER_CONFIG, Adapter, AdapterSettings, adapter_base, new_adapter, read_adapter
from qsun.runtime.decode_module import load_decode
from qsun.runtime.prefill_module import load_prefill
from qsun.runtime.seam import SeamBatch, monolithic_logits, seam_logits
from qsun.tuning.checkpointing import recomputed
from qsun.tuning.examples import Example, collate
from qsun.tuning.job import TuneJob
from qsun.tuning.optimizer import Weights, used_parameters
from qsun.tuning.processes import Processes


class TuneModels(Protocol):
    """What the tuner asks of the modules, however their weights are held.

    Attributes:
        adapter: as it is at the start, where one is tuned.
        weights: those that are tuned.
        in_step: every process must run as many passes as the others, since they exchange weights in each.
    """

    adapter: Adapter | None
    weights: Weights
    in_step: bool

    def batch(self, examples: Sequence[Example]) -> SeamBatch | None:
        """The examples side by side; None where there is nothing to compute."""
        ...

    def logits(self, batch: SeamBatch) -> Tensor:
        """Of the decode module over `rest`, behind the prefill module; of the fine-tune alone for a baseline."""
        ...

    def read_back(self, directory: Path) -> None:
        """Replace what was tuned, which is let go, by a finished directory."""
        ...


class WholeModels:
    """Each process holds all weights of both modules. See `TuneModels`."""

    in_step = False

    def __init__(self, job: TuneJob, processes: Processes):
        self.job, self.processes = job, processes
        self.full = job.config.baseline == "full"
        self.adapter: Adapter | None = None
        self.model: Any = self._load_model()
        self.decode: Any = self.model if self.full else load_decode(job.decode, processes.device, job.dtype).model
        self.weights: Weights = Weights(self.model, job.config.weight_decay, processes)

    def _load_model(self) -> Any:
        job = self.job
        continued = (job.start / ADAPTER_CONFIG).exists()
        start = adapter_base(job.start) if continued else job.start
        model: Any = load_decode(start, self.processes.device, job.dtype).model
        if continued:
            self.adapter = read_adapter(model, job.start)
        elif job.config.lora_rank:
            self.adapter = new_adapter(model, adapter_settings(job), job.config.seed)
        else:
            model.requires_grad_(True)
        if not self.full:
            used = used_parameters(model)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and name in used)
        return model.eval()  # no dropout: the module writes KV as it will in service

    def batch(self, examples: Sequence[Example]) -> SeamBatch | None:
        return collate(examples).to(self.processes.device) if examples else None

    def logits(self, batch: SeamBatch) -> Tensor:
        recompute = self.job.config.grad_checkpoint and torch.is_grad_enabled()
        models = [self.model] if self.full else [self.model, self.decode]
        with recomputed(*models) if recompute else nullcontext():
            return monolithic_logits(self.model, batch) if self.full else seam_logits(self.model, self.decode, batch)

    def read_back(self, directory: Path) -> None:
        del self.weights, self.model
        self.model = load_prefill(directory, dtype=self.job.dtype, device=self.processes.device).model


def adapter_settings(job: TuneJob) -> AdapterSettings:
    """Of a fresh adapter."""
    return AdapterSettings(job.config.lora_rank, 2 * job.config.lora_rank)
