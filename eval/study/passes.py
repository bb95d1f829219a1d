"""Quantization passes compared by divergence on held-out text and CPU seconds."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from qsun.config import QuantConfig
from qsun.eval.harness.divergence import mean_divergence, read_windows
from qsun.progress import Note
from qsun.quantization.run import quantize
from qsun.runtime.decode_module import load_decode


def compare_passes(
    model: str,
    calibration: str,
    valid: Path,
    *,
    grids: list[str],
    methods: list[str],
    settings: dict[str, int],
    windows: tuple[int, int],
    threads: int,
    note: Note = lambda _: None,
) -> list[dict[str, Any]]:
    """Quantize with every method and grid; return rows with kl_x1000, bits_per_weight, cpu_seconds, seconds.

    Args:
        grids: such as "4s" (4 bits, symmetric) or "2a" (2 bits, asymmetric).
        settings: group_size, samples and seq_len of every row.
        windows: number of validation windows, and tokens in each.
    """
    torch.set_num_threads(threads)
    ids = read_windows(valid, model, *windows)
    reference = load_decode(model, device="cpu", dtype="float32").model
    rows = []
    for grid in grids:
        for method in methods:
            chosen = {"method": method, "bits": int(grid[:-1]), "sym": grid.endswith("s")}
            config = QuantConfig.from_dict(settings | chosen)
            with tempfile.TemporaryDirectory() as scratch:
                out = Path(scratch) / "module"
                report = quantize(model, out, config, calibration, device="cpu")
                quantized = load_decode(out, device="cpu", dtype="float32").model
                divergence = 1000 * mean_divergence(quantized, reference, ids)
            rows.append(
                {"method": method, "grid": grid, **settings, "kl_x1000": divergence}
                | {key: report[key] for key in ("bits_per_weight", "cpu_seconds", "seconds")}
            )
            note(f"{method} {grid}: KL x1000 {divergence:.3f}, {report['cpu_seconds']:.1f} CPU s")
    return rows
