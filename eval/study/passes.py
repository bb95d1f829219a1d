"""Quantization passes compared by divergence on held-out text and CPU seconds."""

import re
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch

from qsun.config import QuantConfig
from qsun.data.jsonl import check_no_pipe
from qsun.errors import QsunError
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
        settings: group_size, samples and seq_len of every row; with polish, a calibrated method has a row without, and
            one with so many steps of it.
        windows: number of validation windows, and tokens in each.
    Raises:
        QsunError: no grid or method, one that is not known, or windows that cannot be read.
    """
    check_no_pipe(Path(calibration), "calibration")  # every method reads it
    torch.set_num_threads(threads)
    trials = [
        (grid, method, steps, _config(grid, method, steps, settings))
        for grid, method, steps in product(grids, methods, sorted({0, settings.get("polish", 0)}))
        if not (steps and method == "rtn")
    ]
    if not trials:
        raise QsunError("nothing to compare; give a grid, such as 4s, and a method, such as refined")
    ids = read_windows(valid, model, *windows)
    reference = load_decode(model, device="cpu", dtype="float32").model
    rows = []
    for grid, method, steps, config in trials:
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "module"
            report = quantize(model, out, config, calibration, device="cpu")
            quantized = load_decode(out, device="cpu", dtype="float32").model
            divergence = 1000 * mean_divergence(quantized, reference, ids)
        name = f"{method}, polished" if steps else method
        rows.append(
            {"method": name, "grid": grid, **settings, "polish": steps, "kl_x1000": divergence}
            | {key: report[key] for key in ("bits_per_weight", "cpu_seconds", "seconds")}
        )
        note(f"{name} {grid}: KL x1000 {divergence:.3f}, {report['cpu_seconds']:.1f} CPU s")
    return rows


def _config(grid: str, method: str, polish: int, settings: dict[str, int]) -> QuantConfig:
    found = re.fullmatch(r"(\d+)([sa])", grid)
    if found is None:
        raise QsunError(f"grid {grid!r} is not of the form 4s (4 bits, symmetric) or 4a (asymmetric)")
    chosen = {"method": method, "bits": int(found[1]), "sym": found[2] == "s", "polish": polish}
    return QuantConfig.from_dict(settings | chosen)
