"""torch.cuda of a simulated machine: devices, streams, events and graphs that record operators and replay them."""

import contextlib
import time
from collections import Counter
from types import SimpleNamespace

import torch
from torch.utils._pytree import tree_flatten

from tests.pretend_cuda.tensors import STATE, PretendTensor, to, with_index

NAME, DEVICES, FREE_BYTES, PROCESSORS = "NVIDIA H200", 2, 140 << 30, 132


class PretendStream:
    def __init__(self, device=None, **_):
        self.device = with_index("cuda" if device is None else device)

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def synchronize(self):
        pass


class PretendEvent:
    def __init__(self, **_):
        pass

    def record(self, *_):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1000 * (end.at - self.at) + 1e-6


class PretendGraph:
    """kernels: by name, of one replay. missed: kernels of other devices, which a stream of this device cannot see."""

    def __init__(self, *_, **__):
        self.kernels, self.missed, self.device, self.body = Counter(), Counter(), None, []

    def add(self, name, device, again):
        if device != self.device:
            self.missed[name] += 1
            return
        self.kernels[name] += 1
        self.body.append(again)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.body:
            new = func(*args, **kwargs)
            for old, fresh in zip(tree_flatten(out)[0], tree_flatten(new)[0], strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != fresh.data_ptr():
                    old.copy_(fresh)

    def pool(self):
        return (0, 0)


_streams: dict[int, PretendStream] = {}


def current_stream(device=None):
    device = with_index("cuda" if device is None else device)
    return _streams.setdefault(device.index, PretendStream(device))


@contextlib.contextmanager
def device(target):
    before, number = STATE.current, with_index(target).index
    STATE.current = before if number is None else number
    try:
        yield
    finally:
        STATE.current = before


def device_of(tensor):
    return device(tensor.device) if isinstance(tensor, PretendTensor) else contextlib.nullcontext()


@contextlib.contextmanager
def on_stream(chosen):
    before = _streams.get(chosen.device.index)
    _streams[chosen.device.index] = chosen
    with device(chosen.device):
        try:
            yield
        finally:
            _streams[chosen.device.index] = before or PretendStream(chosen.device)


@contextlib.contextmanager
def graph(captured, pool=None, stream=None, capture_error_mode="global"):
    """Without `stream`, torch captures on a stream of the device that was current when it first captured: device 0."""
    side = PretendStream(torch.device("cuda", 0)) if stream is None else stream
    captured.device = side.device
    STATE.capturing = captured
    STATE.log.graphs.append(captured)
    with on_stream(side):
        try:
            yield
        finally:
            STATE.capturing = None


def patches():
    """Yield (object, attribute, stand-in)."""
    generator, tensor = torch.Generator, torch.tensor

    def on_device(data, *, dtype=None, device=None, **options):
        device = with_index(device)
        if device is None or device.type != "cuda":
            return tensor(data, dtype=dtype, device=device, **options)
        return tensor(data, dtype=dtype, **options).to(device)

    def as_tensor(data, dtype=None, device=None):
        if isinstance(data, torch.Tensor):
            return data.to(device=device or data.device, dtype=dtype or data.dtype)
        return on_device(data, dtype=dtype, device=device)

    class Generator:
        def __new__(cls, device="cpu"):
            return generator("cpu")

    def softmax(x, dim=None, dtype=None):  # C++ would convert to the dtype on a CPU
        return torch.softmax(x if dtype is None else x.to(dtype), dim)

    yield from ((torch, "Generator", Generator), (torch, "tensor", on_device), (torch, "as_tensor", as_tensor))
    yield torch.Tensor, "to", to
    yield torch.Tensor, "type_as", to
    yield torch.nn.functional, "softmax", softmax
    stand_ins = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: DEVICES,
        "current_device": lambda: STATE.current,
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: SimpleNamespace(multi_processor_count=PROCESSORS),
        "mem_get_info": lambda device=None: (FREE_BYTES, FREE_BYTES),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "is_current_stream_capturing": lambda: STATE.capturing is not None,
        "current_stream": current_stream,
        "Stream": PretendStream,
        "Event": PretendEvent,
        "CUDAGraph": PretendGraph,
        "stream": on_stream,
        "graph": graph,
        "device": device,
        "device_of": device_of,
        "graph_pool_handle": lambda: (0, 0),
    }
    yield from ((torch.cuda, name, stand_in) for name, stand_in in stand_ins.items())
