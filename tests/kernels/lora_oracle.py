"""Random grouped low-rank products, their exact results, and how far the kernels may be from them."""

import torch

from qsun.kernels.lora_triton import add_lora_rows, row_tiles, table_entry

EPS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


class Draw:
    """Segments with an adapter each; a rank of 0 stands for one that lacks the layer. Rows of x outside are NaN.

    pairs: a (rank, K) and b (rank, N) of each segment. exact, bound: (M, N) float64.
    gap: columns between rows. first: rows before the first segment.
    """

    def __init__(self, ranks, lengths, N, K, dtype, gap=0, first=0, seed=0, device="cpu"):
        self.generator, self.dtype, self.device = torch.Generator(device).manual_seed(seed), dtype, torch.device(device)
        ends = [first + sum(lengths[: i + 1]) for i in range(len(lengths))]
        self.segments = list(zip([first, *ends[:-1]], ends, strict=True))
        self.pairs = [(self._aligned((rank, K), K**-0.5), self._aligned((rank, N), 0.3)) for rank in ranks]
        M = ends[-1] + 2
        self.x = torch.full((M, K + gap), float("nan"), dtype=dtype, device=device)[:, :K]
        for begin, end in self.segments:
            self.x[begin:end] = self._random(end - begin, K)
        self.y = self._random(M, N).to(dtype)
        self.exact, self.bound = self.y.double(), EPS[dtype] * self.y.double().abs()
        for (begin, end), pair in zip(self.segments, self.pairs, strict=True):
            x, a, b = self.x[begin:end].double(), *(part.double() for part in pair)
            low = x @ a.t()
            rounding = EPS[dtype] * low.abs() + 2.0**-22 * (x.abs() @ a.abs().t())
            self.exact[begin:end] += low @ b
            self.bound[begin:end] += rounding @ b.abs() + 2.0**-22 * (low.abs() @ b.abs())
        self.bound += EPS[dtype] * self.exact.abs()

    def _random(self, *shape):
        return torch.randn(shape, generator=self.generator, device=self.device)

    def _aligned(self, shape, scale):
        """A random tensor at a multiple of 16 bytes, inside a larger one of NaN."""
        count = torch.Size(shape).numel()
        around = torch.full((count + 32,), float("nan"), dtype=self.dtype, device=self.device)
        first = 8 + (-(around.data_ptr() // self.dtype.itemsize + 8)) % (16 // self.dtype.itemsize)
        return around[first : first + count].view(shape).copy_(self._random(*shape) * scale)

    def run(self):
        """The kernels' result, written into the middle of a larger tensor of NaN, as into half of two fused layers."""
        table = torch.tensor([table_entry(a, b) if len(a) else (0, 0, 0) for a, b in self.pairs], device=self.device)
        tiles = row_tiles(self.segments, max(len(a) for a, _ in self.pairs), self.device)
        M, N = self.y.shape
        wide = torch.full((M, 3 * N), float("nan"), dtype=self.dtype, device=self.device)
        wide[:, N : 2 * N] = self.y
        add_lora_rows(wide[:, N : 2 * N], self.x, table, tiles)
        assert wide[:, :N].isnan().all()
        assert wide[:, 2 * N :].isnan().all()
        return wide[:, N : 2 * N]


def check(case):
    """Within the bound, the same bits twice, and no row outside of the segments changed."""
    found = case.run()
    assert torch.equal(found, case.run())
    error = (found.double() - case.exact).abs()
    assert (error <= case.bound).all(), float((error / case.bound).max())
    outside = torch.ones(len(found), dtype=torch.bool, device=found.device)
    for (begin, end), (a, _) in zip(case.segments, case.pairs, strict=True):
        outside[begin:end] &= len(a) == 0
    assert torch.equal(found[outside], case.y[outside])
