"""Tensors that say they are on a CUDA device and hold their data on the CPU.

A dispatch mode sees every operator: it refuses what a device would refuse (operands on different devices), counts
operators as kernels, and notes what makes the host wait. It cannot show races, times or the numerics of real kernels.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

VIEWS = {"view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze"}
VIEWS |= {"squeeze", "as_strided", "detach", "alias", "split", "split_with_sizes", "unbind", "chunk", "movedim"}
VIEWS |= {"diagonal", "unfold", "_reshape_alias", "lift_fresh", "narrow", "view_as_real"}
ALLOCATIONS = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "resize_"}
MIXED = {"_to_copy", "copy_", "index", "index_put_", "_index_put_impl_", "set_"}  # take tensors of several devices
WAITS = {"nonzero", "masked_select", "_unique2", "bincount"}  # their result's size is data


@dataclass
class Log:
    """What a device was asked to do: kernels by name, Triton launches, waits of the host, and captured graphs."""

    kernels: Counter = field(default_factory=Counter)
    launches: list[dict[str, Any]] = field(default_factory=list)
    waits: list[tuple[str, str]] = field(default_factory=list)
    graphs: list[Any] = field(default_factory=list)

    def clear(self):
        self.kernels.clear()
        for notes in (self.launches, self.waits, self.graphs):
            notes.clear()


class State:
    """The one pretended machine: its log, the current device, and the graph that is being captured."""

    def __init__(self):
        self.log, self.current, self.capturing = Log(), 0, None

    def wait(self, why):
        self.log.waits.append((why, _where()))
        if self.capturing is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {why} at {_where()}")

    def launch(self, name, device, again):
        """Count a kernel on a device, and record it where a graph of that device is being captured."""
        self.log.kernels[name] += 1
        if self.capturing is not None:
            self.capturing.add(name, device, again)


STATE = State()


class PretendTensor(torch.Tensor):
    """inner: the data, on the CPU. For C++ the tensor is on the CPU, so that no CUDA build is needed."""

    @staticmethod
    def __new__(cls, inner, device):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype, device="cpu"
        )

    def __init__(self, inner, device):
        self.inner, self._device = inner, device

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: self._device)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @property
    def data(self):
        return PretendTensor(self.inner.detach(), self.device)

    @data.setter
    def data(self, new):
        self.inner = new.inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        with PretendMode():
            return func(*args, **(kwargs or {}))

    def __repr__(self):
        return f"PretendTensor({self.inner!r}, device={self.device})"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = PretendTensor(self.inner.detach().clone(), self.device)
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, requires_grad=self.requires_grad)
            memo[id(self)] = copied
        return memo[id(self)]

    def get_device(self):
        return self.device.index

    def data_ptr(self):
        return self.inner.data_ptr()

    def numpy(self, *_, **__):
        raise TypeError(f"can't convert {self.device} device type tensor to numpy; use Tensor.cpu() first")

    def _read(self, how):
        STATE.wait(how)
        return self.inner

    def item(self):
        return self._read("item").item()

    def tolist(self):
        return self._read("tolist").tolist()

    def cpu(self):
        return self._read("cpu").clone()

    def cuda(self, device=None):
        return self.to("cuda" if device is None else device)

    def __int__(self):
        return int(self._read("int"))

    def __float__(self):
        return float(self._read("float"))

    def __bool__(self):
        return bool(self._read("bool"))

    def __index__(self):
        return self._read("index").__index__()


def with_index(device):
    """Return a torch.device, the current one where "cuda" has no number; None for None."""
    device = (
        None if device is None else torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    )
    return torch.device("cuda", STATE.current) if device is not None and device == torch.device("cuda") else device


_REAL_TO = torch.Tensor.to


def to(tensor, *args, **kwargs):
    """Tensor.to for both kinds; C++ would ask a CUDA driver for the current device."""
    if not args and not kwargs:
        return tensor
    if args and isinstance(args[0], torch.Tensor):  # to C++, it is on the CPU
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})
    device = with_index(device)
    if device is None or device.type != "cuda":
        if not isinstance(tensor, PretendTensor):
            return _REAL_TO(tensor, *args, **kwargs)
        device = tensor.device if device is None else device
    dtype = dtype or tensor.dtype
    if tensor.device == device and tensor.dtype == dtype and not kwargs.get("copy"):
        return tensor
    return torch.ops.aten._to_copy.default(tensor, dtype=dtype, device=device, non_blocking=non_blocking)


class PretendMode(TorchDispatchMode):
    """Runs operators of PretendTensor on their data."""

    operators: dict[str, Any] = {}  # noqa: RUF012  (our own, by name: those that a CPU implements otherwise)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func._schema.name
        base = name.split("::")[1]
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
        pretended = [each for each in tensors if isinstance(each, PretendTensor)]
        target = with_index(kwargs.get("device"))
        if not pretended and (target is None or target.type != "cuda"):
            return func(*args, **kwargs)
        if name in self.operators:
            with PretendMode():
                return self.operators[name](*args, **kwargs)
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        _refuse_mixtures(name, base, tensors, pretended)
        _note_waits(base, args, pretended, target)
        device = target or pretended[0].device
        inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
        out = func(*inner_args, **inner_kwargs)
        if base not in VIEWS | ALLOCATIONS | {"_local_scalar_dense"}:
            STATE.launch(name, device, (func, inner_args, inner_kwargs, out))
        if base.endswith("_") and not base.endswith("__"):
            return args[0]
        if isinstance(kwargs.get("out"), PretendTensor):
            return kwargs["out"]
        if base == "_local_scalar_dense" or device.type == "cpu":
            return out
        return tree_map(lambda each: PretendTensor(each, device) if isinstance(each, torch.Tensor) else each, out)


def _inner(value):
    return value.inner if isinstance(value, PretendTensor) else value


def _refuse_mixtures(name, base, tensors, pretended):
    held = pretended if base in MIXED else [each for each in tensors if each.ndim or isinstance(each, PretendTensor)]
    devices = {each.device for each in held}
    if len(devices) > 1 and base not in ("_to_copy", "copy_"):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found {devices} in {name} at {_where()}"
        )


def _note_waits(base, args, pretended, target):
    if base in WAITS or base == "_local_scalar_dense":
        STATE.wait(base)
    elif base == "_to_copy":
        if not pretended or (target is not None and target.type == "cpu"):
            STATE.wait("copy between host and device")
    elif base == "copy_":
        if len(pretended) < 2 and args[1].ndim:
            STATE.wait("copy between host and device")
    elif base in MIXED and base.startswith(("index", "_index")):
        given = [index for index in args[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) or not isinstance(index, PretendTensor) for index in given):
            STATE.wait("index by a mask or from the host")


def _where():
    """Return the innermost lines of qsun and transformers that led here."""
    frame, lines = sys._getframe(2), []
    while frame and len(lines) < 3:
        file = frame.f_code.co_filename
        if any(part in file for part in ("/qsun/", "/transformers/", "/kernels/", "/eval/")) and "/tests/" not in file:
            lines.append(f"{'/'.join(file.split('/')[-2:])}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(lines)
