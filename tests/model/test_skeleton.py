"""What a model passes to its blocks: the masks and rotary embeddings of one batch shape after another."""

import gc
import json
import shutil
import weakref

import pytest
import torch
from torch import Tensor

import qsun
from qsun.model import stored_layers
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


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}}, "KeyError: 'foo'; correct that value"),
        ({"hidden_act": "bogus"}, "KeyError: 'bogus'"),
        ({"text_config": {}}, "AttributeError: "),
    ],
    ids=["rope_type", "hidden_act", "text_config"],
)
def test_what_transformers_cannot_build_is_one_line(changes, says, tiny_model, tmp_path, cli):
    directory = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(values | changes))
    with pytest.raises(qsun.QsunError, match=rf"transformers .* cannot build the llama model of config\.json: {says}"):
        qsun.load_decode(directory, "cpu")
    for command in (["inspect", directory], ["quantize", directory, "-o", tmp_path / "out"]):
        answer = cli(*command)
        assert (answer.code, answer.err.count("\n")) == (2, 1)


def test_layers_of_a_quantized_block_are_unpacked_on_the_skeletons_device(tiny_model, tmp_path, monkeypatch):
    qsun.quantize(tiny_model(), tmp_path / "q", qsun.QuantConfig(method="rtn", group_size=32), device="cpu")
    skeleton, seen = Skeleton(Checkpoint(tiny_model()), torch.float32, torch.device("cpu")), []
    read = stored_layers.read_quantized_layer
    monkeypatch.setattr(stored_layers, "read_quantized_layer", lambda *args: seen.append(args[4:]) or read(*args))
    stored_layers.load_quantized_block(skeleton, Checkpoint(tmp_path / "q"), 1, "gptq")
    assert seen == [(skeleton.device,)] * 7
