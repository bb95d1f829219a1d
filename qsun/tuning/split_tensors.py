"""Tensors that several processes wrote, each its own rows."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from qsun.model.checkpoint import Checkpoint


class SplitTensors(Mapping[str, Tensor]):
    """Tensors by name whose rows continue from file to file; a tensor may also lie whole in one file.

    Tensors are read when they are asked for.
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
        """Return rows first .. last - 1; a scalar, such as an optimizer's step, is the same in every file."""
        found, before = [], 0
        for file in (file for file in self.files if name in file):
            if not file.shape(name):
                return file.load([name])[name]
            count = file.shape(name)[0]
            begin, end = max(first - before, 0), min(last - before, count)
            if begin < end:
                found.append(file.rows(name, begin, end))
            before += count
        return torch.cat(found)
