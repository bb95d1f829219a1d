"""torch's attention of a pretended device: one kernel, and three more where a bool mask must be made additive."""

import torch
from torch.nn import functional as F

from tests.pretend_cuda.tensors import STATE, PretendTensor

_REAL = F.scaled_dot_product_attention


def scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
    if not isinstance(query, PretendTensor):
        return _REAL(query, key, value, attn_mask, dropout_p, is_causal, **options)
    inner = [None if each is None else each.inner for each in (query, key, value, attn_mask)]

    def compute():
        with torch.no_grad():
            return _REAL(*inner, dropout_p, is_causal, **options)

    out = compute()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        for name in ("scalar_tensor", "scalar_tensor", "where"):
            STATE.launch(f"sdpa::{name}", query.device, (lambda: None, (), {}, None))
    STATE.launch("sdpa::attention", query.device, (compute, (), {}, out))
    return PretendTensor(out, query.device)


def patches():
    """Yield (object, attribute, stand-in)."""
    yield F, "scaled_dot_product_attention", scaled_dot_product_attention
