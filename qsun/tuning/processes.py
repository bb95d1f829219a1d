"""Several processes that tune together, as `accelerate launch` starts them; one process is the usual case."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Processes:
    """This process among all. Examples and the optimizer's state are shared out; weights with `shard` only.

    Attributes:
        rank: 0 is the one that writes. count: of processes. device: this process's own.
    """

    def __init__(self, device: torch.device):
        self.rank, self.count, self.device = 0, 1, device
        if torch.distributed.is_torchelastic_launched() or torch.distributed.is_initialized():
            from accelerate import PartialState

            state = PartialState(cpu=device.type == "cpu")
            self.rank, self.count, self.device = state.process_index, state.num_processes, state.device

    @classmethod
    def alone(cls, device: torch.device) -> "Processes":
        """This process as if there were no other."""
        one = cls.__new__(cls)
        one.rank, one.count, one.device = 0, 1, device
        return one

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over the processes, in place."""
        if self.count > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def sum_at(self, rank: int, tensor: Tensor) -> None:
        """Sum a tensor over the processes, in place, in one of them; in the others it is then undefined."""
        if self.count > 1:
            torch.distributed.reduce(tensor, rank)

    def send_from(self, rank: int, tensor: Tensor) -> None:
        """Make a tensor the same everywhere, in place."""
        if self.count > 1:
            torch.distributed.broadcast(tensor, rank)

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            torch.distributed.barrier()
