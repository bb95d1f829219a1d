"""Scores of the demo base on documents of the corpus: greedy exact match and teacher-forced loss."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from qsun.demo.tokenizer import BOS_ID, EOS_ID, PAD_ID, character_ids

IGNORED = -100


def _left_padded(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return (B, T) ids and attention mask of prompts that open a document."""
    rows = [[BOS_ID, *character_ids(prompt)] for prompt in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[PAD_ID] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@torch.no_grad()
def exact_match(model: LlamaForCausalLM, documents: Sequence[tuple[str, str]]) -> float:
    """Return the share of prompts that greedy decoding answers exactly, end of document included."""
    ids, mask = _left_padded([prompt for prompt, _ in documents])
    answers = [[*character_ids(response), EOS_ID] for _, response in documents]
    longest = max(map(len, answers))
    produced = model.generate(  # type: ignore[misc]
        input_ids=ids, attention_mask=mask, max_new_tokens=longest, do_sample=False, pad_token_id=PAD_ID
    )
    rows = produced[:, ids.shape[1] :].tolist()
    exact = [row[: len(answer)] == answer for row, answer in zip(rows, answers, strict=True)]
    return float(sum(exact) / len(exact))


@torch.no_grad()
def response_loss(model: LlamaForCausalLM, documents: Sequence[tuple[str, str]]) -> float:
    """Return the mean cross entropy in nats of a response character, given all before it."""
    rows, labels = [], []
    for prompt, response in documents:
        opening, answer = [BOS_ID, *character_ids(prompt)], [*character_ids(response), EOS_ID]
        rows.append(opening + answer)
        labels.append([IGNORED] * len(opening) + answer)
    width = max(map(len, rows))
    # Padding on the right needs no mask in a causal model: no scored position attends to it.
    ids = torch.tensor([row + [PAD_ID] * (width - len(row)) for row in rows])
    targets = torch.tensor([row + [IGNORED] * (width - len(row)) for row in labels])
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets[:, 1:].flatten(), ignore_index=IGNORED)
    return float(loss)
