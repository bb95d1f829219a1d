"""What a stopped run of tuning goes on from: parts in its working directory, a share of each from every process."""

import time
from typing import Any

import torch
from torch import Tensor

from qsun.model.checkpoint import Checkpoint
from qsun.model.output_dir import Workdir
from qsun.tuning.processes import Processes
from qsun.tuning.split_tensors import SplitTensors

_SAVE_SECONDS = 30.0  # between two states, at least: they take 12 bytes a weight, and a GPU validates every few seconds


class RunState:
    """The best weights so far, written when they are found, and the state of a step, written from time to time."""

    def __init__(self, work: Workdir, processes: Processes):
        self.work, self.processes = work, processes
        self._best: list[str] = []  # names of the parts of all processes
        self._best_of_saved: list[str] = []
        self._saved_at = time.monotonic()

    def keep_best(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Write this process's share of the best weights; those before them stay if a saved state needs them."""
        before, self._best = self._best, self._write("best", step, tensors)
        if before and before != self._best_of_saved:
            self.work.drop(before[self.processes.rank])

    def best(self) -> SplitTensors:
        return self._read(self._best)

    def is_due(self) -> bool:
        """Whether to save a state now; the first process decides for all."""
        due = torch.zeros(1, device=self.processes.device)
        due += self.processes.first and time.monotonic() - self._saved_at >= _SAVE_SECONDS
        self.processes.sum_([due])
        return bool(due)

    def save(self, step: int, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Write the state of a step, a share from each process, then delete the state before it."""
        parts = self._write("share", step, tensors)
        self.processes.wait()
        if self.processes.first:  # a state's record is written after all of its parts
            self.work.write(f"state-{step:09d}", {}, record | {"parts": parts, "best_parts": self._best})
            old = [*self.work.names("state-")[:-1], *self.work.names("share-"), *self.work.names("best-")]
            for name in old:
                if name not in parts + self._best:
                    self.work.drop(name)
        self.processes.wait()
        self._best_of_saved, self._saved_at = self._best, time.monotonic()

    def saved(self) -> tuple[SplitTensors, dict[str, Any]] | None:
        """Return the last state, of all processes, and its record; None if none was saved."""
        kept = self.work.names("state-")
        if not kept:
            return None
        record = self.work.record(kept[-1])
        self._best = self._best_of_saved = record["best_parts"]
        return self._read(record["parts"]), record

    def _write(self, kind: str, step: int, tensors: dict[str, Tensor]) -> list[str]:
        parts = [f"{kind}-{step:09d}-{rank}" for rank in range(self.processes.count)]
        self.work.write(parts[self.processes.rank], tensors, {})
        return parts

    def _read(self, parts: list[str]) -> SplitTensors:
        return SplitTensors([Checkpoint(self.work.part(name)) for name in parts])
