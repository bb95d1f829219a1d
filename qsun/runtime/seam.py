"""The seam in tensors: which positions a row holds, what each may see, and the forward passes on either side.

A row's cache is aligned to the right: its prefilled tokens end in the last prefilled column, so that all rows of a
batch decode at the same column, whatever their lengths and whichever prefill module wrote them. Masks are made here,
not by transformers: they then need no padding mask to be looked at (a CUDA graph cannot), and hold for every version.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.integrations import sdpa_attention

from qsun.data.examples import TokenExample
from qsun.model.architectures import architecture_of, kv_shape
from qsun.runtime.kv_cache import CACHE_ARGUMENT
from qsun.runtime.prefill_pass import fill_cache
from qsun.runtime.rotary import row_lengths

IGNORED = -100  # label of a position that is no response token


@dataclass(frozen=True)
class SeamBatch:
    """Examples side by side; prefill reads `prefix`, decode reads `rest`.

    Attributes:
        prefix: (B, P) int64, prompts without their last token, aligned to the right; P may be 0.
        rest: (B, R) int64, the last prompt token and the response without its last token, aligned to the left.
        labels: (B, R) int64, the token that follows each of `rest`; IGNORED on padding.
        starts: (B,) int64, the first column of each prefix that is no padding.
    """

    prefix: Tensor
    rest: Tensor
    labels: Tensor
    starts: Tensor

    def to(self, device: torch.device) -> "SeamBatch":
        return SeamBatch(*(t.to(device) for t in (self.prefix, self.rest, self.labels, self.starts)))


def collate(examples: Sequence[TokenExample], least_prefix: int = 0) -> SeamBatch:
    """Lay examples out: prompts without their last token left of the seam, that token and the response right of it.

    least_prefix: the prefix has at least this many columns, padding if no prompt needs them.
    """
    P = max(least_prefix, max(len(e.prompt) for e in examples) - 1)
    R = max(len(e.response) for e in examples)
    prefix = torch.zeros(len(examples), P, dtype=torch.int64)
    rest = torch.zeros(len(examples), R, dtype=torch.int64)
    labels = torch.full((len(examples), R), IGNORED)
    for row, example in enumerate(examples):
        head = example.prompt[:-1]
        prefix[row, P - len(head) :] = torch.tensor(head, dtype=torch.int64)
        fed = (example.prompt[-1], *example.response[:-1])
        rest[row, : len(fed)] = torch.tensor(fed)
        labels[row, : len(fed)] = torch.tensor(example.response)
    return SeamBatch(prefix, rest, labels, torch.tensor([P + 1 - len(e.prompt) for e in examples]))


def seam_masks(model: Any, starts: Tensor | None, columns: Tensor, length: int) -> Any:
    """Return what queries at these columns see of `length` columns of cache, as the model's forward takes it.

    Args:
        starts: (B,) first column of each row that is no padding; None: 0 in all rows.
        columns: columns of the queries, (Q,) for all rows or (B, Q). A query in padding sees itself, so that no
            softmax is empty.
    Returns:
        A mask (B, 1, Q, length), or one for each attention type: bool, or additive where attention is eager.
    """
    kinds = mask_kinds(model.config)
    key = torch.arange(length, device=columns.device)
    query = columns[..., None]
    causal = key <= query
    if starts is not None:
        causal = causal & (key >= starts[:, None, None]) | (key == query)
    masks = {}
    for kind in kinds:
        window = window_of(model.config, kind)
        seen = causal if window is None else causal & (key > query - window)
        masks[kind] = as_attention_takes_it(seen[:, None], model)
    return masks.get("all", masks)


def goes_unmasked(model: Any, length: int) -> bool:
    """Whether a decode step over `length` columns, none of them padding, is better off without a mask.

    The step's token must see all of them in every layer, and eager attention would be given a mask by transformers all
    the same.
    """
    windows = [window_of(model.config, kind) for kind in mask_kinds(model.config)]
    sees_all = all(w is None or length < w for w in windows)
    return sees_all and model.config._attn_implementation != "eager" and not _faster_masked(model)


def _faster_masked(model: Any) -> bool:
    """Grouped-query attention of one token in bfloat16 or float16 on a CPU without AMX.

    Given a mask, transformers packs the query heads of a group into one product; given none, it leaves groups to torch,
    which takes every head alone: up to 8 times as long in attention, 4 in the step (docs/speed.md).
    """
    weight, config = model.model.embed_tokens.weight, model.config
    grouped = kv_shape(config)[1] < config.num_attention_heads
    if weight.device.type != "cpu" or weight.dtype.itemsize != 2 or not grouped:
        return False
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return hasattr(sdpa_attention, "pack_gqa") and not capabilities.get("amx_bf16")


def unmasked(model: Any) -> dict[str, None] | None:
    """`seam_masks` where there is nothing to hide."""
    kinds = mask_kinds(model.config)
    return None if kinds == {"all"} else dict.fromkeys(kinds)


def unread_masks(model: Any) -> Any:
    """`seam_masks` of no column, where no layer reads one; attention would refuse it."""
    nothing = torch.empty((1, 1, 1, 0), dtype=torch.bool, device=model.model.embed_tokens.weight.device)
    kinds = mask_kinds(model.config)
    return nothing if kinds == {"all"} else dict.fromkeys(kinds, nothing)


def mask_kinds(config: Any) -> set[str]:
    """Return the attention types that have a mask each, or "all" where one serves every layer."""
    return set(config.layer_types) if architecture_of(config.model_type).masks_by_type else {"all"}


def window_of(config: Any, kind: str) -> int | None:
    """Return the sliding window of an attention type; None: it sees everything."""
    return None if kind == "full_attention" else getattr(config, "sliding_window", None)


def as_attention_takes_it(seen: Tensor, model: Any) -> Tensor:
    """Return a bool mask as the model's attention wants it: additive where it is eager."""
    if model.config._attn_implementation != "eager":
        return seen
    dtype = model.model.embed_tokens.weight.dtype
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def _positions(starts: Tensor, columns: Tensor) -> Tensor:
    """(B, Q) position_ids; padding is at 0."""
    return (columns - starts[:, None]).clamp(min=0)


def prefill_batch(model: Any, batch: SeamBatch) -> Any:
    """The KV cache of the prefixes, with gradients where they are enabled."""
    cache = DynamicCache()
    P = batch.prefix.shape[1]
    if P:
        columns = torch.arange(P, device=batch.prefix.device)
        with row_lengths(model, P - batch.starts):
            fill_cache(
                model,
                cache,
                input_ids=batch.prefix,
                attention_mask=seam_masks(model, batch.starts, columns, P),
                position_ids=_positions(batch.starts, columns),
            )
    return cache


def seam_hidden(prefill: Any, decode: Any, batch: SeamBatch) -> Tensor:
    """(B, R, hidden) states of the decode model over `rest`, attending to what the prefill model wrote."""
    return decode_hidden(decode, batch, prefill_batch(prefill, batch))


def decode_hidden(decode: Any, batch: SeamBatch, cache: Any) -> Tensor:
    """`seam_hidden` for prefixes that were read before; cache: of B rows and P columns, `rest` is added to it."""
    P, R = batch.prefix.shape[1], batch.rest.shape[1]
    columns = torch.arange(P, P + R, device=batch.rest.device)
    with row_lengths(decode, P - batch.starts):
        return decode.model(
            input_ids=batch.rest,
            attention_mask=seam_masks(decode, batch.starts, columns, P + R),
            position_ids=_positions(batch.starts, columns),
            **{CACHE_ARGUMENT: cache},
            use_cache=True,
        ).last_hidden_state


def monolithic_hidden(model: Any, batch: SeamBatch) -> Tensor:
    """The same from one model in one forward pass without a cache, as fine-tuning is usually done."""
    P, R = batch.prefix.shape[1], batch.rest.shape[1]
    columns = torch.arange(P + R, device=batch.rest.device)
    with row_lengths(model, P - batch.starts + (batch.labels != IGNORED).sum(-1)):
        states = model.model(
            input_ids=torch.cat([batch.prefix, batch.rest], 1),
            attention_mask=seam_masks(model, batch.starts, columns, P + R),
            position_ids=_positions(batch.starts, columns),
            use_cache=False,
        ).last_hidden_state
    return states[:, P:]


def prefilled_rows(model: Any, rows: list[list[int]], chunk: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Keys and values of each row by layer, (heads, tokens, head_dim) each.

    Rows are padded on the right: causal attention never looks there, so no mask is needed and the fastest attention
    is used. Long rows are read `chunk` tokens at a time, which bounds the memory of activations.
    """
    if not any(rows):
        yield from ([] for _ in rows)
        return
    device = model.model.embed_tokens.weight.device
    longest = max(map(len, rows))
    tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    cache = DynamicCache()
    for start in range(0, longest, chunk):
        extend_prefill(model, tokens[:, start : start + chunk], start, cache, list(map(len, rows)))
    layers: Any = cache.layers
    for number, row in enumerate(rows):
        yield [(layer.keys[number, :, : len(row)], layer.values[number, :, : len(row)]) for layer in layers]


def extend_prefill(model: Any, tokens: Tensor, start: int, cache: Any, lengths: list[int]) -> None:
    """Add the KV of tokens (B, T) to a cache that holds the `start` tokens before them; lengths: of the whole rows."""
    positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
    with row_lengths(model, lengths):
        fill_cache(model, cache, input_ids=tokens, position_ids=positions)
