"""The quantized layers of a module, under the names that vLLM gives to the layers that it fuses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qsun.config import LayerSpec
from qsun.errors import QsunError
from qsun.model.checkpoint import Checkpoint
from qsun.model.formats import SUFFIXES
from qsun.model.stored_layers import layer_spec, quantized_layer_names


@dataclass(frozen=True)
class StoredLayers:
    """The quantized layers of a decode module's directory.

    Settings are read from the shapes of the tensors, as load_decode does, so that both engines agree.
    """

    checkpoint: Checkpoint
    fmt: str
    names: frozenset[str]

    @classmethod
    def of(cls, checkpoint: Checkpoint, fmt: str) -> "StoredLayers":
        return cls(checkpoint, fmt, frozenset(quantized_layer_names(checkpoint)))

    def parts(self, name: str, fused: Mapping[str, Sequence[str]]) -> list[str]:
        """Return the stored layers of a vLLM layer, in order; none if it is stored in full precision.

        Args:
            fused: names of the parts by the last name of the fused layer.
        Raises:
            QsunError: only some of the parts are quantized.
        """
        stem, dot, last = name.rpartition(".")
        parts = [stem + dot + part for part in fused.get(last, [last])]
        plain = [part for part in parts if part not in self.names]
        if plain and len(plain) < len(parts):
            raise QsunError(f"{plain[0]} is not quantized and the rest of {name} is; vLLM computes them as one layer")
        return [] if plain else parts

    def spec(self, parts: Sequence[str], in_features: int) -> LayerSpec:
        """Return the settings of a fused layer. Raises QsunError if its parts differ."""
        specs = [layer_spec(self.checkpoint, part, self.fmt, in_features) for part in parts]
        for part, spec in zip(parts, specs, strict=True):
            if spec != specs[0]:
                raise QsunError(f"{parts[0]} is {specs[0]} and {part} is {spec}; vLLM computes them as one layer")
        return specs[0]

    def suffixes(self, parts: Sequence[str]) -> list[str]:
        """Return the suffixes of the stored tensors of a fused layer. Raises QsunError if its parts differ."""
        known = SUFFIXES[self.fmt.removesuffix("_v2")]
        found = [[suffix for suffix in known if f"{part}.{suffix}" in self.checkpoint] for part in parts]
        for part, suffixes in zip(parts, found, strict=True):
            if suffixes != found[0]:
                raise QsunError(f"{parts[0]} has {found[0]} and {part} has {suffixes}; vLLM computes them as one layer")
        return found[0]

    def dense_bytes(self) -> int:
        """Estimate the bytes of float32 copies of all quantized layers; most stored bytes hold two weights."""
        names = [name for layer in self.names for name in self.checkpoint.names(layer + ".")]
        return self.checkpoint.size_bytes(names) * 2 * 4
