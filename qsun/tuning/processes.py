"""The processes that tune together, as `accelerate launch` starts them; usually there is only one."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Processes:
    """This process among all. They share out examples and the optimizer's state, and weights with `shard` only.

    Attributes:
        device: this process's own. rank: 0 is the one that writes. count: of processes.
    """

    device: torch.device
    rank: int = 0
    count: int = 1

    @classmethod
    def launched(cls, device: torch.device) -> "Processes":
        """Join the processes of `accelerate launch` or torchrun; without them, this process is the only one."""
        if not (torch.distributed.is_torchelastic_launched() or torch.distributed.is_initialized()):
            return cls(device)
        from accelerate import PartialState

        state = PartialState(cpu=device.type == "cpu")
        return cls(state.device, state.process_index, state.num_processes)

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
        """Copy a tensor of one process to all others, in place."""
        if self.count > 1:
            torch.distributed.broadcast(tensor, rank)

    def wait(self) -> None:
        """Wait until every process has arrived here."""
        if self.count > 1:
            torch.distributed.barrier()

    def wait_until(self, done: Callable[[], bool]) -> None:
        """Wait for what only the first process does, however long it takes; torch's own waits end after minutes.

        Where the first process fails, the launcher ends the others.
        """
        while not done():
            time.sleep(_POLL_SECONDS)
