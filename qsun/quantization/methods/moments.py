"""Second moments of activations, accumulated over batches of rows: all that a pass reads of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

_TILES = 8  # the Hessian is symmetric: of this many strips, only what is on and under the diagonal is multiplied out
_NARROWEST_TILE = 128
_LONGEST_SUM = 512  # MKL splits the sums of longer products among threads (seen on an Intel Xeon): other last bits


@dataclass
class Moments:
    """Sums over calibration tokens of one stage's input.

    Attributes:
        gram: (K, K) float32, sum of x x^T with x the input that the quantized module sees.
        drift: (K, K), sum of (x_full - x) x^T: how the full-precision input moves with x. None: not tracked.
        missing: (N, K), sum of m x^T, with m what the layer's output should have more than W x. None likewise.
        absolute: (K,), sum of |x|, for AWQ. None: not tracked.
        tokens: rows seen.
    """

    gram: Tensor
    absolute: Tensor | None = None
    drift: Tensor | None = None
    missing: Tensor | None = None
    tokens: int = 0

    @classmethod
    def zeros(cls, features: int, device: torch.device, absolute: bool = False) -> "Moments":
        gram = torch.zeros(features, features, device=device)
        return cls(gram, torch.zeros(features, device=device) if absolute else None)

    def add(self, x: Tensor, x_full: Tensor | None = None, missing: Tensor | None = None) -> None:
        """Add rows. x, x_full: (rows, K); missing: (rows, N), what outputs should have more, but for x_full's part.

        Differences from full precision are small and only correct a weight: of bfloat16 activations they are multiplied
        in bfloat16, at twice the speed.
        """
        exact = x.float()
        add_gram(self.gram, exact)
        if self.absolute is not None:
            self.absolute += exact.abs().sum(0)
        self.tokens += len(x)
        right = x if x.dtype == torch.bfloat16 else exact
        if x_full is not None:
            self.drift = _accumulate(self.drift, x_full.to(right.dtype) - right, right)
        if missing is not None:
            self.missing = _accumulate(self.missing, missing.to(right.dtype), right)

    def hessian(self) -> Tensor:
        """Return the (K, K) mean of x x^T, both triangles."""
        full = torch.tril(self.gram)
        full += torch.tril(self.gram, -1).t()
        return full.div_(max(self.tokens, 1))

    def mean_absolute(self) -> Tensor:
        assert self.absolute is not None  # whoever asks had it tracked
        return self.absolute / max(self.tokens, 1)


def add_gram(gram: Tensor, x: Tensor) -> None:
    """Add x^T x to the lower triangle of gram (tiles above the diagonal stay as they are). x: (rows, K)."""
    features = gram.shape[0]
    tile = max(_NARROWEST_TILE, -(-features // _TILES))
    for piece in _pieces(x):
        for start in range(0, features, tile):
            rows = slice(start, start + tile)
            stop = min(start + tile, features)
            gram[rows, :stop].addmm_(piece[:, rows].t(), piece[:, :stop])


def _accumulate(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    for a, b in zip(_pieces(left), _pieces(right), strict=True):
        product = (a.t() @ b).float()
        total = product if total is None else total.add_(product)
    assert total is not None  # there are rows
    return total


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right, (M, K) and (K, N), with the same bits from any number of threads."""
    if left.device.type != "cpu":
        return left @ right
    longest = _LONGEST_SUM * 4 // left.element_size()
    total = left.new_zeros(len(left), right.shape[1])
    for a, b in zip(left.split(longest, 1), right.split(longest), strict=True):
        total.addmm_(a, b)
    return total


def _pieces(rows: Tensor) -> tuple[Tensor, ...]:
    return rows.split(_LONGEST_SUM) if rows.device.type == "cpu" else (rows,)


def squared_norm(rows: Tensor) -> float:
    """Return the sum of squares of (rows, features), in an order that the number of threads does not change."""
    return ordered_sum(rows.float().square().sum(1))


def ordered_sum(values: Tensor) -> float:
    """Return the sum of (n,) values from first to last; torch splits a sum among its threads."""
    return float(values.cumsum(0)[-1])
