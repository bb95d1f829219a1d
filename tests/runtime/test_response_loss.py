"""Cross-entropy and distillation by pieces, against float64 over whole logits; and that whole logits never exist."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from qsun.runtime.logits import response_loss
from qsun.runtime.seam import IGNORED

ROWS, COLUMNS, WIDTH, VOCABULARY = 3, 5, 8, 37


def head_model(seed, width=WIDTH, vocabulary=VOCABULARY, cap=None, dtype=torch.float64, trained=False):
    """What a loss reads of a causal LM."""
    torch.manual_seed(seed)
    head = nn.Linear(width, vocabulary, bias=False, dtype=dtype).requires_grad_(trained)
    return SimpleNamespace(lm_head=head, config=SimpleNamespace(vocab_size=vocabulary, final_logit_softcapping=cap))


def whole_logits(model, hidden):
    logits = hidden @ model.lm_head.weight.T
    cap = model.config.final_logit_softcapping
    return logits if cap is None else cap * torch.tanh(logits / cap)


def brute_force(model, hidden, labels, teacher, weight):
    total = torch.zeros((), dtype=torch.float64)
    for row in range(labels.shape[0]):
        for column in range(labels.shape[1]):
            label = int(labels[row, column])
            if label == IGNORED:
                continue
            q = whole_logits(model, hidden[row, column]).softmax(-1)
            total = total - (1 - weight) * q[label].log()
            if teacher is not None:
                p = whole_logits(teacher[0], teacher[1][row, column]).softmax(-1).detach()
                total = total + weight * (p * (p.log() - q.log())).sum()
    return total


@pytest.mark.parametrize("positions", [1, 4, 1000], ids=lambda n: f"pieces of {n}")
@pytest.mark.parametrize("weight", [None, 0.0, 0.3, 1.0], ids=lambda w: f"teacher {w}")
@pytest.mark.parametrize(("cap", "trained"), [(None, False), (2.0, False), (None, True), (1.5, True)])
def test_loss_and_gradient(positions, weight, cap, trained, monkeypatch):
    monkeypatch.setattr("qsun.runtime.logits.PIECE_BYTES", 4 * VOCABULARY * positions)
    model = head_model(0, cap=cap, trained=trained)
    hidden = torch.randn(ROWS, COLUMNS, WIDTH, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(VOCABULARY, (ROWS, COLUMNS))
    labels[0, 2:], labels[2] = IGNORED, IGNORED
    teacher = None if weight is None else (head_model(1, width=6), torch.randn(ROWS, COLUMNS, 6, dtype=torch.float64))
    parameters = [hidden, *(p for p in model.lm_head.parameters() if p.requires_grad)]
    ours = response_loss(model, hidden, labels, teacher, weight or 0.0)
    found = torch.autograd.grad(3 * ours, parameters)
    expected = brute_force(model, hidden, labels, teacher, weight or 0.0)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    for gradient, wanted in zip(found, torch.autograd.grad(3 * expected, parameters), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-13)
    with torch.no_grad():
        torch.testing.assert_close(response_loss(model, hidden, labels, teacher, weight or 0.0), expected)


def test_no_response_token_at_all():
    hidden = torch.randn(2, 3, WIDTH, requires_grad=True)
    loss = response_loss(head_model(0, dtype=torch.float32), hidden, torch.full((2, 3), IGNORED))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()


def test_a_teacher_that_is_the_model_itself_teaches_nothing():
    model, hidden = head_model(0), torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    loss = response_loss(model, hidden, torch.ones(2, 3, dtype=torch.int64), (model, hidden.detach()), 1.0)
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert hidden.grad.abs().max() < 1e-12


def test_half_precision_is_summed_in_float32():
    model = head_model(0, dtype=torch.bfloat16, trained=True)
    hidden = torch.randn(2, 3, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.ones(2, 3, dtype=torch.int64)
    loss = response_loss(model, hidden, labels)
    loss.backward()
    assert (loss.dtype, hidden.grad.dtype, model.lm_head.weight.grad.dtype) == (
        torch.float32,
        torch.bfloat16,
        torch.bfloat16,
    )
    expected = F.cross_entropy(model.lm_head(hidden).float().flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


class Largest(TorchDispatchMode):
    """Notes the most elements of a tensor that an operator makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.mark.parametrize("taught", [False, True])
def test_whole_logits_of_a_large_vocabulary_never_exist(taught, monkeypatch):
    monkeypatch.setattr("qsun.runtime.logits.PIECE_BYTES", 4 << 20)
    vocabulary, positions = 262_144, 40
    model = head_model(0, 2, vocabulary, dtype=torch.float32)
    hidden = torch.randn(1, positions, 2, requires_grad=True)
    teacher = (head_model(1, 2, vocabulary, dtype=torch.float32), torch.randn(1, positions, 2)) if taught else None
    with Largest() as largest:
        response_loss(model, hidden, torch.ones(1, positions, dtype=torch.int64), teacher, 0.5).backward()
    assert largest.elements <= (4 << 20) / 4 < positions * vocabulary / 8
    assert hidden.grad.isfinite().all()
