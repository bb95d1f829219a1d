"""Sizes of known models, to measure speed without a download."""

from dataclasses import dataclass

from qsun.errors import QsunError


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only Transformer. ranks: of tensor parallelism; layer shapes are those of one rank."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool = False
    ranks: int = 1

    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Return (N, K) of each matrix of a block as a decode step runs them: q, k, v and gate, up are merged."""
        heads = self.head_dim * self.heads // self.ranks
        kv = self.head_dim * self.kv_heads // self.ranks
        inner = self.intermediate // self.ranks
        return {
            "qkv": (heads + 2 * kv, self.hidden),
            "o": (self.hidden, heads),
            "gate_up": (2 * inner, self.hidden),
            "down": (self.hidden, inner),
        }


MODEL_SHAPES = {
    "llama-3.1-8b": ModelShape(4096, 32, 32, 8, 128, 14336, 128256),
    "llama-3.1-70b-tp4": ModelShape(8192, 80, 64, 8, 128, 28672, 128256, ranks=4),
    "llama-3.2-1b": ModelShape(2048, 16, 32, 8, 64, 8192, 128256, tied=True),
    "qwen3-8b": ModelShape(4096, 36, 32, 8, 128, 12288, 151936),
    "qwen3-1.7b": ModelShape(2048, 28, 16, 8, 128, 6144, 151936, tied=True),
}


def known_shape(name: str) -> ModelShape:
    """Return the sizes of a known model that fits one device. Raises QsunError for another name."""
    sizes = MODEL_SHAPES.get(name)
    if sizes is None or sizes.ranks > 1:
        known = ", ".join(name for name, known in MODEL_SHAPES.items() if known.ranks == 1)
        raise QsunError(f"shape {name!r} is not known; use one of {known}")
    return sizes
