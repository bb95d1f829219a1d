"""Logits in pieces are the model's own, in every architecture, and a large vocabulary needs little memory."""

import pytest
import torch

from qsun.model.architectures import ARCHITECTURES
from qsun.runtime.decode_module import load_decode
from qsun.runtime.logits import PIECE_BYTES, head_logits, position_pieces
from tests.tiny_models import FAMILIES, random_tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_the_heads_logits_are_the_models(tiny_model, family):
    model = load_decode(tiny_model(family), "cpu", torch.float32).model
    tokens = torch.from_numpy(random_tokens(2, 9))
    with torch.no_grad():
        hidden = model.model(input_ids=tokens).last_hidden_state
        torch.testing.assert_close(head_logits(model, hidden), model(input_ids=tokens).logits)


def test_every_architecture_is_tried():
    assert set(ARCHITECTURES) <= set(FAMILIES)


@pytest.mark.parametrize(("count", "vocabulary"), [(1000, 262_144), (7, 128), (5, 10**9)])
def test_pieces_cover_all_positions_and_are_bounded(count, vocabulary):
    pieces = list(position_pieces(count, vocabulary))
    assert [n for piece in pieces for n in range(count)[piece]] == list(range(count))
    assert all(4 * vocabulary * (piece.stop - piece.start) <= max(PIECE_BYTES, 4 * vocabulary) for piece in pieces)
