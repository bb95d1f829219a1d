"""A LoRA adapter, read as the plain model that it is when merged."""

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from qsun.model.checkpoint import Checkpoint
from qsun.model.lora import ADAPTER_CONFIG, adapter_base, adapter_file, merged_weight, stored_adapter
from qsun.model.skeleton import empty_model, read_model_config


class AdaptedCheckpoint(Checkpoint):
    """An adapter's base with the adapter merged as tensors are loaded: in float32, then rounded to the base's dtype.

    `load_prefill` merges in the same way, so these are the weights that serve. Only what is asked for is in memory,
    and the adapter.

    Args:
        adapter: directory of a LoRA adapter.

    Attributes:
        scale: of the adapter's product; its fingerprint, of tensors alone, does not know it.

    Raises:
        QsunError: its base is not here or is another, or it is not plain LoRA.
    """

    def __init__(self, adapter: Path):
        super().__init__(adapter_base(adapter))
        self.adapter = adapter
        stored = stored_adapter(empty_model(read_model_config(self.directory)), adapter)
        self.scale = stored.settings.scale
        self._weights = {f"{layer}.weight": pair for layer, pair in stored.weights.items()}

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        tensors = super().load(names)
        for name in tensors.keys() & self._weights.keys():
            stored = tensors[name]
            tensors[name] = merged_weight(stored, *self._weights[name], self.scale).to(stored.dtype)
        return tensors

    def fingerprint(self) -> str:
        """Return the adapter's own, as its qsun.json has it."""
        return adapter_file(self.adapter).fingerprint()


def open_prefill(directory: Path) -> Checkpoint:
    """Open the tensors of a prefill module: a plain directory's own, or those of an adapter on its base."""
    return AdaptedCheckpoint(directory) if (directory / ADAPTER_CONFIG).exists() else Checkpoint(directory)
