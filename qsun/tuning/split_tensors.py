"""Tensors that several processes wrote together."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from qsun.model.checkpoint import Checkpoint


class SplitTensors(Mapping[str, Tensor]):
    """Tensors whose rows lie one after the other in several files: each process wrote the rows that it holds.

    A tensor may also be whole in one of them. Nothing is read before it is asked for.
    """

    def __init__(self, files: Sequence[Checkpoint]):
        self.files = files

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name for file in self.files for name in file.names()))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return any(name in file.files for file in self.files)

    def __getitem__(self, name: str) -> Tensor:
        parts = [file.load([name])[name] for file in self.files if name in file]
        if not parts:
            raise KeyError(name)
        return torch.cat(parts) if parts[0].ndim else parts[0]

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows first .. last - 1; a number (such as an optimizer's step), which every file has, as it is."""
        found, passed = [], 0
        for file in (file for file in self.files if name in file):
            if not file.shape(name):
                return file.load([name])[name]
            count = file.shape(name)[0]
            begin, end = max(first - passed, 0), min(last - passed, count)
            if begin < end:
                found.append(file.rows(name, begin, end))
            passed += count
        return torch.cat(found)
