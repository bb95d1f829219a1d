"""What a model passes to its blocks: the masks and rotary embeddings of one batch shape after another."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from qsun.model.checkpoint import Checkpoint
from qsun.model.skeleton import Skeleton


def tensors_in(value):
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (tensor for inner in value.values() for tensor in tensors_in(inner))
    elif isinstance(value, (list, tuple)):
        yield from (tensor for inner in value for tensor in tensors_in(inner))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "llama"])
def test_masks_of_only_one_batch_shape_are_in_memory(family, tiny_model):
    """Calibration batches of 1,000 prompts have a thousand shapes, and a mask of Gemma 2 is as large as attention."""
    skeleton = Skeleton(Checkpoint(tiny_model(family)), torch.float32, torch.device("cpu"))
    alive = []
    for rows, columns in ((3, 20), (2, 21), (1, 40), (3, 20)):
        hidden = torch.zeros(rows, columns, 64)
        arguments = [skeleton.block_arguments(index, hidden) for index in range(len(skeleton.layers))]
        gc.collect()
        assert not any(ref() is not None for ref in alive), "the arguments of an earlier shape"
        alive = [weakref.ref(tensor) for tensor in tensors_in(arguments)]
        assert alive
        del arguments
        assert skeleton.block_arguments(0, hidden) is skeleton.block_arguments(0, hidden), "computed once a shape"
