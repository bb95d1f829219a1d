"""`qsun bench kernels`: packed weights against full precision and other kernels, at real layer shapes."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qsun.errors import QsunError
from qsun.eval.output.table import Table
from qsun.eval.speed.clock import copy_bandwidth, interleaved
from qsun.eval.speed.kernel_peers import CPU_CONTENDERS, CUDA_CONTENDERS, Product
from qsun.eval.speed.model_shapes import MODEL_SHAPES
from qsun.figure import new_figure, tidy
from qsun.kernels.layout import TILES
from qsun.model.quantized import Quantized
from qsun.progress import Note

CPU = torch.device("cpu")
OURS = ("bf16", "ours")
_COLUMNS = {
    **{name: f"{{{name}}}" for name in ("model", "layer", "N", "K", "M", "kernel")},
    "us": "{microseconds:.1f}",
    "x bf16": "{ratio_to_bf16:.2f}",
    "% copy": "{bandwidth_percent:.1f}",
}
_BEYOND_CACHES_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}  # of packed weights, in all copies of a matrix
_WRONG = 0.2  # relative error beyond rounding; humming quantizes the weights itself


@dataclass(frozen=True)
class KernelTiming:
    """One contender at one shape and M; bandwidth_percent is relative to the copy bandwidth of this run."""

    model: str
    layer: str
    N: int
    K: int
    M: int
    kernel: str
    microseconds: float
    ratio_to_bf16: float
    bandwidth_percent: float


@dataclass(frozen=True)
class KernelVariant:
    """The grid that is timed, and the dtype and device of the activations."""

    group_size: int = 128
    sym: bool = True
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = CPU
    bits: int = 4


@dataclass(frozen=True)
class Patience:
    """Turns of each contender at a point, fewer after `seconds`; shapes not started within `minutes` are left out."""

    rounds: int = 25
    seconds: float = 3.0
    minutes: float = float("inf")


@torch.inference_mode()
def bench_kernels(
    layers: Sequence[tuple[str, str, int, int]],
    rows: Sequence[int],
    kind: KernelVariant,
    patience: Patience,
    note: Note = lambda _: None,
    peers: bool = True,
) -> dict[str, Any]:
    """Time every contender at every layer shape.

    Args:
        layers: (model, layer, N, K), from `layers_of`.
        rows: values of M.
        note: called with what is left out and why.
        peers: False: ours and bf16 only, as some of the others search for launches, or compile, for a minute a shape.
    Returns:
        {"device", "copy_gb_per_s", "rows": [KernelTiming as dict], "geometric_mean": {kernel: {M: ratio to bf16}}}.
    Raises:
        QsunError: bits that no kernel has; our product is wrong, or bfloat16's. A peer's leaves it out.
    """
    device, group_size = kind.device, kind.group_size
    check_bits(kind.bits)
    bandwidth = copy_bandwidth(device, (1 << 30) if device.type == "cuda" else (128 << 20))
    found: list[KernelTiming] = []
    started = time.perf_counter()
    for model, layer, N, K in layers:
        if group_size != -1 and K % group_size:
            raise QsunError(f"group_size {group_size} does not divide K = {K} of {N}x{K}; use a divisor, or -1")
        if time.perf_counter() - started > 60 * patience.minutes:
            note(f"{model} {layer} {N}x{K} left out: {patience.minutes:g} minutes are over")
            continue
        contenders = dict(_contenders(N, K, kind, note, peers))
        for M in rows:
            x = torch.randn(M, K, device=device).to(kind.dtype)
            medians = interleaved(_calls(contenders, x), device, patience.rounds, patience.seconds)
            moved = _moved_bytes(M, N, K, kind)
            found += [
                KernelTiming(
                    *(model, layer, N, K, M, kernel, 1e6 * taken, medians["bf16"] / taken),
                    100 * moved["bf16" if kernel == "bf16" else "packed"] / taken / bandwidth,
                )
                for kernel, taken in medians.items()
            ]
            note(f"{model} {layer} {N}x{K} M={M}: " + _line(medians))
    return {
        "device": device.type,
        "copy_gb_per_s": bandwidth / 1e9,
        "rows": [asdict(row) for row in found],
        "geometric_mean": mean_ratios(found),
    }


def check_bits(bits: int) -> None:
    """Raise QsunError for bits that no kernel has."""
    if bits not in TILES:
        raise QsunError(f"bits {bits} has no kernel; use 2, 3, 4 or 8")


def layers_of(models: Sequence[str], shapes: Sequence[str]) -> list[tuple[str, str, int, int]]:
    """Return (model, layer, N, K) of known models and of shapes such as "4096x4096", or raise QsunError."""
    found = []
    for model in models:
        if model not in MODEL_SHAPES:
            raise QsunError(f"model {model} has no known shape; use {', '.join(MODEL_SHAPES)}, or --shape NxK")
        found += [(model, layer, N, K) for layer, (N, K) in MODEL_SHAPES[model].linear_layers().items()]
    for shape in shapes:
        sides = shape.lower().split("x")
        if len(sides) != 2 or not all(side.isdecimal() and int(side) % 32 == 0 and int(side) for side in sides):
            raise QsunError(f"shape {shape} is not NxK with multiples of 32, such as 4096x14336")
        found.append(("", shape, int(sides[0]), int(sides[1])))
    return found


def random_weights(N: int, K: int, kind: KernelVariant) -> Quantized:
    """Draw integers and scales of a realistic layer: outputs of about unit variance."""
    device = kind.device
    G = 1 if kind.group_size == -1 else K // kind.group_size
    steps = 1 << kind.bits
    q = torch.randint(0, steps, (N, K), dtype=torch.uint8, device=device)
    scales = (torch.rand(G, N, device=device) + 0.5) * (3.2 / steps / math.sqrt(K))
    drawn = torch.randint(1, steps, (G, N), dtype=torch.uint8, device=device)
    return Quantized(q, scales.bfloat16().float(), torch.full_like(drawn, steps // 2) if kind.sym else drawn)


def _contenders(N: int, K: int, kind: KernelVariant, note: Note, peers: bool) -> Iterator[tuple[str, list[Product]]]:
    """Yield each contender's products with copies of one matrix, once its result is checked."""
    weights = random_weights(N, K, kind)
    device = kind.device
    copies = max(2, math.ceil(_BEYOND_CACHES_BYTES[device.type] / (N * K * kind.bits / 8)))
    x = torch.randn(3, K, device=device).to(kind.dtype)
    wanted = x.float() @ weights.dequantize().t()
    for name, builder in (CUDA_CONTENDERS if peers and device.type == "cuda" else CPU_CONTENDERS).items():
        try:
            build = builder(weights, kind.group_size, kind.dtype, kind.bits)
            products = [build() for _ in range(copies)]
            error = float((products[-1](x).float() - wanted).norm() / wanted.norm())
        except Exception as reason:
            if name in OURS:
                raise
            note(f"{name} left out: {type(reason).__name__}: {reason}")  # a peer's failure must not end the bench
            continue
        if not error <= (_WRONG if name == "humming" else 0.02):
            wrong = f"{name} at {N} x {K} is wrong by {error:.3g} (relative)"
            if name in OURS:
                raise QsunError(f"{wrong}: nothing was measured")
            note(f"{wrong}: left out")
            continue
        yield name, products


def _calls(contenders: dict[str, list[Product]], x: Tensor) -> dict[str, list[Callable[[], object]]]:
    return {name: [lambda f=product: f(x) for product in products] for name, products in contenders.items()}  # type: ignore[misc]


def _moved_bytes(M: int, N: int, K: int, kind: KernelVariant) -> dict[str, float]:
    """Return the bytes that must move: weights, scales, inputs and outputs, each once."""
    G = 1 if kind.group_size == -1 else K // kind.group_size
    size = kind.dtype.itemsize
    ends = (M * K + M * N) * size
    return {"bf16": N * K * size + ends, "packed": N * K * kind.bits / 8 + (1 if kind.sym else 2) * G * N * size + ends}


def mean_ratios(rows: Sequence[KernelTiming]) -> dict[str, dict[int, float]]:
    """Return the geometric mean over layer shapes of the ratio to bf16, by kernel and M."""
    ratios: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        ratios.setdefault(row.kernel, {}).setdefault(row.M, []).append(math.log(row.ratio_to_bf16))
    return {
        kernel: {M: math.exp(sum(logs) / len(logs)) for M, logs in by_rows.items()}
        for kernel, by_rows in ratios.items()
    }


def kernel_figure(result: Mapping[str, Any], title: str) -> Any:
    """Draw the speed-up over bf16 by M, the geometric mean over shapes, one line a kernel."""
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    for kernel, by_rows in result["geometric_mean"].items():
        style: dict[str, Any] = {"color": "black", "linestyle": "--"} if kernel == "bf16" else {"marker": "o"}
        axes.plot(list(by_rows), list(by_rows.values()), label=kernel, linewidth=1.6, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(by_rows), [str(M) for M in by_rows])
    axes.set_xlabel("rows M (requests in the decode batch)")
    axes.set_ylabel("times as fast as bf16")
    axes.set_title(title)
    tidy(axes)
    axes.legend(fontsize=8)
    return figure


def report_text(result: Mapping[str, Any]) -> str:
    """Return lines for a terminal."""
    means = [
        f"geometric mean of {kernel} over bf16: " + "  ".join(f"M={M}: {ratio:.2f}" for M, ratio in by_rows.items())
        for kernel, by_rows in result["geometric_mean"].items()
    ]
    head = f"{result['machine']}, torch {result['torch']}, copy {result['copy_gb_per_s']:.0f} GB/s"
    # a CPU's products are bound by arithmetic, and not all of them read the bytes of their bits
    columns = {name: text for name, text in _COLUMNS.items() if name != "% copy" or result["device"] != "cpu"}
    return "\n".join([head, Table.of(result["rows"], columns).text(), *means])


def _line(medians: dict[str, float]) -> str:
    return ", ".join(f"{kernel} {1e6 * taken:.0f} us" for kernel, taken in medians.items())
