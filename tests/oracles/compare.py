"""Our side of a comparison: logits of qsun.load_decode, and how far another tool's answers are from them."""

import json
import os
from pathlib import Path

import numpy as np
import torch

import qsun

CLEAR_MARGIN = 1.25  # of logits up to about 22, whose bfloat16 noise was measured to be up to 0.63


@torch.no_grad()
def our_logits(directory: Path, tokens: np.ndarray | Path, dtype: torch.dtype) -> np.ndarray:
    """(rows, columns, vocabulary) float32 logits of the module as qsun loads it."""
    ids = np.load(tokens, allow_pickle=False) if isinstance(tokens, Path) else tokens
    model = qsun.load_decode(directory, device="cpu", dtype=dtype).model
    return model(torch.from_numpy(ids)).logits.float().numpy()


def difference(theirs: np.ndarray, ours: np.ndarray) -> float:
    """Largest difference of two logit arrays."""
    assert theirs.shape == ours.shape
    assert np.isfinite(theirs).all()
    return float(np.abs(theirs - ours).max())


def relative(theirs: np.ndarray, ours: np.ndarray) -> float:
    """Root mean square of the difference over that of our logits: what a lower precision's noise is measured by."""
    assert theirs.shape == ours.shape
    assert np.isfinite(theirs).all()
    return float(np.sqrt(np.square(theirs - ours).mean() / np.square(ours).mean()))


def clear_steps(logits: np.ndarray) -> np.ndarray:
    """Where our first choice leads the second by more than CLEAR_MARGIN; elsewhere rounding decides."""
    top = np.sort(logits, axis=-1)
    return top[..., -1] - top[..., -2] > CLEAR_MARGIN


def disagreements(choices: np.ndarray, ours: np.ndarray) -> tuple[int, int]:
    """At how many clear steps another tool chose another token, and how many clear steps there are."""
    clear = clear_steps(ours)
    return int((choices != ours.argmax(-1))[clear].sum()), int(clear.sum())


def record(test: str, **measured: object) -> None:
    """Print what was measured (pytest -s), and append it to the file that QSUN_ORACLES_LOG names."""
    line = json.dumps({"test": test, **measured})
    print(line)
    if path := os.environ.get("QSUN_ORACLES_LOG"):
        with Path(path).open("a", encoding="utf-8") as log:
            log.write(line + "\n")
