"""float64 definitions of a decode step's norms, rotations and attention."""

import torch

EPS = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-22}


def assert_close(y, wanted, steps=2):
    """Within so many rounding steps of the dtype of y, of values or of 1."""
    assert y.shape == wanted.shape
    assert ((y.double() - wanted).abs() <= steps * EPS[y.dtype] * wanted.abs().clamp(min=1)).all()


def normed(x, weight, eps, offset):
    """x / rms(x) * (offset + weight)."""
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (offset + weight.double())


def rotated(x, cos, sin):
    """x (rows, heads, D) rotated as by transformers' apply_rotary_pos_emb; cos and sin (rows, D)."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def attended(q, keys, values, columns, scale, window=None, softcap=None):
    """Attention of each row to its own columns: (rows, heads * D)."""
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for row, column in enumerate(columns.tolist()):
        first = 0 if window is None else max(0, column + 1 - window)
        k, v = (x[row, :, first : column + 1].double() for x in (keys, values))
        groups = q.shape[1] // k.shape[0]
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        scores = torch.einsum("hd,hnd->hn", q[row].double(), k) * scale
        scores = scores if softcap is None else softcap * (scores / softcap).tanh()
        out[row] = torch.einsum("hn,hnd->hd", scores.softmax(-1), v)
    return out.flatten(1)
