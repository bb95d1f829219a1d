"""The two modules of a tuning run, with each process holding a share of every block's weights (torch's FSDP2).

A block's weights are gathered when it runs, in the forward and again in the backward pass, and released after it. FSDP
recognizes that the backward pass enters a block by the gradients of the block's *results*. K and V also reach the loss
through the cache, in the last layer of a prefill module only so; therefore a block returns them here, and they are put
into the cache outside of what FSDP watches.

A quantized decode module is sharded too: its integers become parameters without gradients.
"""

import gc
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from qsun.data.examples import TokenExample
from qsun.model.architectures import block_prefix
from qsun.model.checkpoint import Checkpoint
from qsun.model.lora import ADAPTER_CONFIG, Adapter, adapter_base, place_adapter, stored_adapter
from qsun.model.pairing import on_decode_weights
from qsun.model.skeleton import empty_model, read_model_config
from qsun.runtime.decode_module import DecodeModule, place_weights
from qsun.runtime.kv_cache import CACHE_ARGUMENT
from qsun.runtime.logits import response_loss
from qsun.runtime.prefill_module import PrefillModule
from qsun.runtime.prefill_pass import completes
from qsun.runtime.quant_linear import QuantLinear
from qsun.runtime.rotary import use_row_rotary
from qsun.runtime.seam import IGNORED, SeamBatch, collate, monolithic_hidden, seam_hidden
from qsun.tuning.checkpointing import kv_of, with_kv
from qsun.tuning.job import TuneJob
from qsun.tuning.models import make_trainable
from qsun.tuning.optimizer import Optimizer, add_gradient
from qsun.tuning.processes import Processes
from qsun.tuning.start import TeacherPlan
from qsun.tuning.teacher import Teacher

_IDLE = TokenExample((0, 0), (0,))  # for a process that has no example left, but must run as many passes as the others


class ShardedModels:
    """Each process holds a share of all weights of both modules. See `TuneModels`."""

    in_step = True

    def __init__(self, job: TuneJob, processes: Processes):
        self.job, self.processes = job, processes
        self.fine_tune = job.config.fine_tune
        self.mesh = init_device_mesh(processes.device.type, (processes.count,))
        outline = empty_model(read_model_config(job.base)).to("meta")
        self.adapter = make_trainable(outline, job)
        tuned = {name for name, parameter in outline.named_parameters() if parameter.requires_grad}
        model, dtypes = self._load(Checkpoint(job.start.weights), tuned, self.adapter, head=self.fine_tune)
        self._seam = self._joined(model)
        self.optimizer: Optimizer = ShardedOptimizer(model, dtypes, job.config.weight_decay, processes)

    def _joined(self, model: Any) -> nn.Module:
        decode = None if self.fine_tune else self._load(Checkpoint(self.job.decode), (), None, head=True)[0]
        teacher = None if self.job.teacher is None else self._teacher(self.job.teacher)
        trained = self.fine_tune and self.adapter is None
        return self._shard(_Seam(model, decode, teacher, self.job.config.teacher_weight), trained)

    def _teacher(self, plan: TeacherPlan) -> Teacher:
        whole = plan.decode is None
        prefill = self._finished(plan.directory, plan.decode, head=whole)
        decode = prefill if plan.decode is None else self._load(Checkpoint(plan.decode), (), None, head=True)[0]
        return Teacher(PrefillModule(prefill, plan.directory), DecodeModule(decode, plan.decode or plan.directory))

    def _finished(self, directory: Path, decode: Path | None, head: bool) -> Any:
        """Load a module, or an adapter, unmerged, on its base or on the weights of this decode module."""
        if not (directory / ADAPTER_CONFIG).exists():
            return self._load(Checkpoint(directory), (), None, head)[0]
        weights = decode if decode is not None and on_decode_weights(directory) else adapter_base(directory)
        adapter = stored_adapter(empty_model(read_model_config(weights)), directory)
        return self._load(Checkpoint(weights), (), adapter, head)[0]

    def _load(
        self, checkpoint: Checkpoint, tuned: Collection[str], adapter: Adapter | None, head: bool
    ) -> tuple[Any, dict[str, torch.dtype]]:
        """Load a model and keep this process's share; no more than one block is ever whole in memory.

        Args:
            tuned: names of the parameters to train; their shares are float32 and are the masters.
            head: whether the output of the last block is used.
        Returns:
            The model, and the dtype in which each tuned parameter is computed and saved.
        """
        model = empty_model(read_model_config(checkpoint.directory)).requires_grad_(False)
        place = partial(place_weights, model, checkpoint, self.job.dtype, self.processes.device)
        dtypes: dict[str, torch.dtype] = {}
        # an adapter casts itself, and scales under it keep float32
        shard = partial(self._shard, trained=bool(tuned) and adapter is None)
        for index, layer in enumerate(model.model.layers):
            prefix = block_prefix(index)
            place(prefixes=(prefix,))
            if adapter is not None:
                place_adapter(model, adapter, prefix)
            dtypes |= _prepare(layer, prefix, tuned)
            inner = _BlockWithKV(layer, self.job.config.grad_checkpoint)
            model.model.layers[index] = _ShardedBlock(shard(inner), index)
        if not head:
            model.lm_head, model.config.tie_word_embeddings = nn.Identity(), False
        place(prefixes=("model.embed_tokens.", "model.norm.", *(["lm_head"] if head else [])))
        dtypes |= _prepare(model.model.embed_tokens, "model.embed_tokens.", tuned)
        dtypes |= _prepare(model.model.norm, "model.norm.", tuned)
        dtypes |= _prepare(model.lm_head, "lm_head.", tuned)
        if not (head and model.config.tie_word_embeddings):
            shard(model.model.embed_tokens)
        if not head:
            shard(model.model.norm)  # with a head it is gathered as a part of the whole, `_Seam`
        model.to(self.processes.device).eval()
        use_row_rotary(model)
        return model, dtypes

    def _shard(self, module: nn.Module, trained: bool) -> nn.Module:
        """Shard a module; if trained, with float32 shares and gradients, gathered in the computation's dtype."""
        policy = MixedPrecisionPolicy(self.job.dtype, torch.float32, cast_forward_inputs=False)
        policy = policy if trained else MixedPrecisionPolicy(cast_forward_inputs=False)
        sharded: FSDPModule = fully_shard(module, mesh=self.mesh, reshard_after_forward=True, mp_policy=policy)
        sharded.set_gradient_divide_factor(1.0)  # the loss is already divided by all tokens
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor
        return module

    def batch(self, examples: Sequence[TokenExample]) -> SeamBatch | None:
        """Put the examples side by side, never None: without examples the loss is 0, and the prefix is never empty."""
        batch = collate(examples or [_IDLE], least_prefix=1)
        if not examples:
            batch.labels.fill_(IGNORED)
        return batch.to(self.processes.device)

    def loss(self, batch: SeamBatch) -> Tensor:
        return self._seam(batch)

    def read_back(self, directory: Path) -> None:
        del self.optimizer, self._seam
        gc.collect()  # FSDP and its modules refer to each other
        self.processes.wait()
        self._seam = self._joined(self._finished(directory, self.job.decode, head=self.fine_tune))


class _Seam(nn.Module):
    """Both models and the loss in one module, so that FSDP sees where a pass begins and ends."""

    def __init__(self, model: Any, decode: Any | None, teacher: Teacher | None, weight: float):
        super().__init__()
        self.model, self.decode, self.teacher, self.weight = model, decode, teacher, weight
        models = [] if teacher is None else [teacher.prefill.model, teacher.decode.model]
        self.of_teacher = nn.ModuleList(dict.fromkeys(models))

    def forward(self, batch: SeamBatch) -> Tensor:
        if self.decode is None:
            hidden = monolithic_hidden(self.model, batch)
        else:
            hidden = seam_hidden(self.model, self.decode, batch)
        taught = None if self.teacher is None else self.teacher.states(batch)
        return response_loss(
            self.model if self.decode is None else self.decode, hidden, batch.labels, taught, self.weight
        )


class _BlockWithKV(nn.Module):
    """A block that returns its K and V with its output."""

    def __init__(self, block: nn.Module, recompute: bool):
        super().__init__()
        self.block, self.recompute = block, recompute

    def forward(
        self, hidden: Tensor, keys: Tensor | None, values: Tensor | None, args: Any, arguments: Any, kv_only: bool
    ) -> Any:
        run: Any = partial(with_kv, self.block, args=args, arguments=arguments, kv_only=kv_only)
        if self.recompute and torch.is_grad_enabled():
            run = partial(checkpoint, run, use_reentrant=False)
        output, keys, values = run(hidden, keys, values)
        return output, keys.clone(), values.clone()  # FSDP refuses views


class _ShardedBlock(nn.Module):
    """Takes the place of a block and puts the K and V that it returns into the cache."""

    def __init__(self, inner: nn.Module, index: int):
        super().__init__()
        self.inner, self.index = inner, index
        self.attention_type = getattr(inner.block, "attention_type", None)  # read by some models' forward

    def forward(self, hidden: Tensor, *args: Any, **arguments: Any) -> Any:
        cache = arguments.pop(CACHE_ARGUMENT, None)
        kv_only = completes(cache, self.index)
        output, keys, values = self.inner(hidden, *kv_of(cache, self.index), args, arguments, kv_only)
        if cache is not None:
            cache.update(keys, values, self.index)
        return output


def _plain(name: str) -> str:
    """Return a parameter's name in a model whose blocks are not wrapped."""
    return name.replace(".inner.block.", ".")


def _prepare(module: nn.Module, prefix: str, tuned: Collection[str]) -> dict[str, torch.dtype]:
    """Make every weight a parameter, in float32 if it is tuned. Returns the dtypes of the tuned ones before that."""
    for layer in [layer for layer in module.modules() if isinstance(layer, QuantLinear)]:
        for name, tensor in list(layer._buffers.items()):
            if tensor is not None:
                del layer._buffers[name]
                layer.register_parameter(name, nn.Parameter(tensor.contiguous(), requires_grad=False))
    dtypes = {}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(prefix + name in tuned)
        if parameter.requires_grad:
            dtypes[prefix + name] = parameter.dtype
            parameter.data = parameter.data.float()
    return dtypes


class ShardedOptimizer(Optimizer):
    """An optimizer of sharded parameters: the float32 rows that each process holds are its masters.

    Args:
        model: sharded. dtypes: in which each tuned parameter is saved.
    """

    def __init__(self, model: Any, dtypes: dict[str, torch.dtype], weight_decay: float, processes: Processes):
        self.processes, self.dtypes = processes, dtypes
        self.parameters = {_plain(name): p for name, p in model.named_parameters() if p.requires_grad}
        shares = {name: nn.Parameter(_local(p)) for name, p in self.parameters.items()}
        self._start({name: share for name, share in shares.items() if share.numel()}, weight_decay)

    def first_row(self, name: str) -> int:
        return self.processes.rank * -(-self.parameters[name].shape[0] // self.processes.count)

    def take_gradients(self) -> None:
        for name, parameter in self.parameters.items():
            new, parameter.grad = parameter.grad, None
            if new is not None and name in self.masters:
                master, share = self.masters[name], _local(new)
                add_gradient(master, share)

    def _publish(self) -> None:
        """Do nothing: the next pass gathers the masters."""

    def tuned(self) -> dict[str, Tensor]:
        return {name: master.detach().to(self.dtypes[name]) for name, master in self.masters.items()}


def _local(tensor: Any) -> Tensor:
    """Return this process's rows of a sharded tensor, without a copy."""
    rows: Tensor = tensor.detach().to_local()
    return rows
