"""The optimizer: which parameters matter, their float32 master weights, AdamW, and the learning rate."""

import math
from typing import Any

import torch
from torch import Tensor

from qsun.runtime.seam import SeamBatch, prefill_batch
from qsun.tuning.processes import Processes
from qsun.tuning.split_tensors import SplitTensors


def used_parameters(model: Any) -> set[str]:
    """Return the names of the parameters that a prefill module's KV cache depends on.

    They are found by walking the graph of a forward pass over two tokens, so it works for every family and for
    adapters. The head, the final norm, and the last layer's q, o and MLP are not among them.
    """
    device = model.model.embed_tokens.weight.device
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
    with torch.enable_grad():
        cache = prefill_batch(
            model, SeamBatch(tokens, tokens, tokens, torch.zeros(1, dtype=torch.int64, device=device))
        )
    waiting = [tensor.grad_fn for layer in cache.layers for tensor in (layer.keys, layer.values)]
    seen, reached = set(), set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        waiting += [after for after, _ in node.next_functions]
    return {name for name, parameter in model.named_parameters() if id(parameter) in reached}


_PIECE = 2**20  # values of a gradient that are converted at a time
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW


class Optimizer:
    """AdamW over float32 master weights of a model's trainable parameters.

    Every process holds all parameters and a share of the masters and of AdamW's moments (12 bytes a weight).

    Args:
        model: its parameters that require gradients are tuned, in place.

    Attributes:
        parameters: by name. masters: this process's share; in one process a float32 parameter is its own master.
    """

    def __init__(self, model: Any, weight_decay: float, processes: Processes):
        self.processes = processes
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.owners = assign_owners({name: p.numel() for name, p in self.parameters.items()}, processes.count)
        mine = {name: p for name, p in self.parameters.items() if self.owners[name] == processes.rank}
        self._start({name: _master(p, alone=processes.count == 1) for name, p in mine.items()}, weight_decay)

    def _start(self, masters: dict[str, Tensor], weight_decay: float) -> None:
        self.masters = masters
        # norms and biases are left out: 0 is not a neutral value for them
        groups = [
            {"params": [m for m in self.masters.values() if m.ndim > 1], "weight_decay": weight_decay},
            {"params": [m for m in self.masters.values() if m.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self.adamw = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True) if groups else None

    def take_gradients(self) -> None:
        """Move the parameters' gradients, summed over all processes, to the masters, adding to what is there."""
        for name, parameter in self.parameters.items():
            master = self.masters.get(name)
            if master is parameter:
                continue
            new = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = None
            if self.processes.count > 1:
                new = new.to(torch.promote_types(new.dtype, torch.float32))
                self.processes.sum_at(self.owners[name], new)
            if master is not None:
                add_gradient(master, new)

    def multiply_gradients(self, factor: float) -> None:
        """Multiply the masters' gradients, which are float32."""
        if factor != 1:
            for master in self.masters.values():
                if master.grad is not None:
                    master.grad.mul_(factor)

    @torch.no_grad()
    def step(self, lr: float, clip: float) -> float:
        """Take one step of AdamW. Returns the norm of the gradient before clipping."""
        gradients = [master.grad for master in self.masters.values() if master.grad is not None]
        square = torch.zeros((), dtype=torch.float64, device=self.processes.device)
        for gradient in gradients:
            square += torch.linalg.vector_norm(gradient, dtype=torch.float64) ** 2
        self.processes.sum_([square])
        norm = float(square.sqrt())
        if norm > clip:
            for gradient in gradients:
                gradient.mul_(clip / norm)
        if self.adamw is not None:
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
            # on a CPU, memory that is given back costs page faults at every step
            self.adamw.zero_grad(set_to_none=self.processes.device.type != "cpu")
        self._publish()
        return norm

    def _publish(self) -> None:
        for name, parameter in self.parameters.items():
            master = self.masters.get(name)
            if master is not None and master is not parameter:
                parameter.data.copy_(master)
            self.processes.send_from(self.owners[name], parameter.data)

    def first_row(self, name: str) -> int:
        """Return the row of the parameter at which this process's master begins."""
        return 0

    def tuned(self) -> dict[str, Tensor]:
        """Return this process's share of the current weights, in the computation's dtype."""
        return {name: self.parameters[name].detach() for name in self.masters}

    def state(self) -> dict[str, Tensor]:
        """Return this process's share of what a resumed run needs."""
        kept: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            kept[f"master.{name}"] = master.detach()
            moments = {} if self.adamw is None else self.adamw.state[master]
            kept |= {f"{key}.{name}": value.detach() for key, value in moments.items()}
        return kept

    @torch.no_grad()
    def restore(self, kept: SplitTensors) -> None:
        """Continue from the `state` of all processes; they may have been more or fewer than now."""
        for name, master in self.masters.items():
            first = self.first_row(name)
            last = first + master.shape[0]
            master.copy_(kept.rows(f"master.{name}", first, last))
            moments = [key for key in _MOMENTS if f"{key}.{name}" in kept]  # there are none before the first step
            if moments and self.adamw is not None:
                loaded = {key: kept.rows(f"{key}.{name}", first, last) for key in moments}
                self.adamw.state[master] = {key: value.to(master.device) for key, value in loaded.items()}
                if master.device.type == "cpu":  # as `step` leaves it: AdamW moves a weight that has no gradient, too
                    master.grad = torch.zeros_like(master)
        self._publish()


def add_gradient(master: Tensor, new: Tensor) -> None:
    """Add to the master's gradient in place and by pieces: new tensors for it cost ten times as much on a CPU."""
    if master.grad is None:
        master.grad = new.to(master.dtype)
    else:
        rows = max(1, _PIECE // max(1, new[0].numel()))
        for total, more in zip(master.grad.split(rows), new.split(rows), strict=True):
            total.add_(more)


def assign_owners(sizes: dict[str, int], count: int) -> dict[str, int]:
    """Assign each name to one of `count` processes, in order of size, always to the least loaded."""
    loads, owners = [0] * count, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += sizes[name]
    return owners


def _master(parameter: Tensor, alone: bool) -> Tensor:
    precise = torch.promote_types(parameter.dtype, torch.float32)
    if alone and parameter.dtype == precise:
        return parameter
    return torch.nn.Parameter(parameter.detach().to(precise, copy=True))


def learning_rate(step: int, steps: int, peak: float, warmup: float, lowest: float) -> float:
    """Return the rate of a step, counted from 0: a linear rise over `warmup` of the steps, then a cosine.

    The cosine ends at `lowest` * peak.
    """
    rise = max(1, round(warmup * steps))
    if step < rise:
        return peak * (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    return peak * (lowest + (1 - lowest) * (1 + math.cos(math.pi * done)) / 2)
