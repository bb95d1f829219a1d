"""One set of prefill weights gives every row of a pass the KV that its own adapter, merged, would give it."""

import copy

import pytest
import torch

import qsun
from qsun.adapters import shared_prefill
from qsun.adapters.adapter_module import AdapterLibrary
from qsun.adapters.shared_prefill import AdaptedLinear, SharedPrefill
from qsun.model.architectures import architecture_of
from qsun.runtime.fused_block import FusedBlock
from qsun.runtime.fused_projections import GatedMLP, MergedPart, merge_projections
from qsun.runtime.seam import prefilled_rows
from tests.adapter_rig import KINDS, merged, write_adapter
from tests.tiny_models import FAMILIES

LENGTHS = (9, 1, 20, 20, 13, 2, 7)
PROMPTS = [[3 + (7 * row + 11 * i) % 120 for i in range(length)] for row, length in enumerate(LENGTHS)]


def kv(model, prompts, chunk=8):
    with torch.no_grad():
        return [torch.cat([torch.cat(pair) for pair in layers]) for layers in prefilled_rows(model, prompts, chunk)]


def check_rows(library, weights, directories, tolerance=2e-5):
    """Rows of several adapters and of none, an adapter's two side by side, against each alone in its merged module."""
    modules = [library.open(directory) for directory in directories]
    loaded = [module.load() for module in modules]
    rows = [None, *loaded, loaded[-1], *[None] * 6][: len(PROMPTS)]
    plain = qsun.PrefillModule(weights, library.decode.directory)
    references = {id(None): plain} | {
        id(one): merged(weights, path) for one, path in zip(loaded, directories, strict=True)
    }
    with modules[0].shared.rows(rows):
        written = kv(modules[0].shared.model, PROMPTS)
    apart = 0.0
    for prompt, row, found in zip(PROMPTS, rows, written, strict=True):
        expected = kv(references[id(row)].model, [prompt])[0]
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        if row is not None:
            apart = max(apart, float((expected - kv(weights, [prompt])[0]).abs().max()))
    assert apart > 0.5  # the adapters are not small
    torch.testing.assert_close(kv(modules[0].shared.model, PROMPTS[:1]), kv(weights, PROMPTS[:1]), rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_many_adapters(family, tiny_model, tmp_path):
    directory = tiny_model(family)
    decode = qsun.load_decode(directory, "cpu", "float32")
    ends = [name.rpartition(".")[2] for name in architecture_of(family).linear_names()]
    kinds = [[end for end in kind if end in ends] for kind in KINDS]
    paths = [write_adapter(tmp_path / str(i), directory, i, 2 + i, kind) for i, kind in enumerate(kinds)]
    check_rows(AdapterLibrary(decode), decode.model, paths)


@pytest.mark.parametrize("each", [0, 3], ids=["one by one", "in one product"])
@pytest.mark.parametrize("merge", [False, True], ids=["plain", "merged projections"])
def test_adapters_of_one_shape(each, merge, quantized, base_directory, tmp_path, monkeypatch):
    used, batched = [], shared_prefill._add_batched
    monkeypatch.setattr(shared_prefill, "_ROWS_EACH", each)
    monkeypatch.setattr(shared_prefill, "_add_batched", lambda *a: used.append(a) or batched(*a))
    decode = qsun.load_decode(quantized, "cpu", "float32", merge=merge)
    apart = qsun.load_decode(quantized, "cpu", "float32")
    paths = [write_adapter(tmp_path / str(i), base_directory, i, 3, decode=quantized) for i in range(4)]
    check_rows(AdapterLibrary(decode), apart.model, paths)
    assert bool(used) is bool(each)


@pytest.mark.parametrize("merge", [False, True], ids=["plain", "merged projections"])
def test_on_the_weights_of_a_quantized_decode_module(merge, quantized, base_directory, tmp_path):
    decode = qsun.load_decode(quantized, "cpu", "float32", merge=merge)
    apart = qsun.load_decode(quantized, "cpu", "float32")
    kinds = {isinstance(module, (GatedMLP, MergedPart)) for module in decode.model.modules()}
    assert (True in kinds) is merge
    paths = [write_adapter(tmp_path / str(i), base_directory, i, 3, kind, quantized) for i, kind in enumerate(KINDS)]
    check_rows(AdapterLibrary(decode), apart.model, paths)


def test_merged_full_precision_projections(base_directory, tmp_path):
    decode = qsun.load_decode(base_directory, "cpu", "float32")
    apart = copy.deepcopy(decode.model)
    merge_projections(decode.model, decode.model.config, dense=True)
    paths = [write_adapter(tmp_path / str(i), base_directory, i, 3, kind) for i, kind in enumerate(KINDS)]
    check_rows(AdapterLibrary(decode), apart, paths)


def test_the_decode_module_is_left_as_it_was(base_directory):
    decode = qsun.load_decode(base_directory, "cpu", "float32")
    names = [name for name, _ in decode.model.named_modules()]
    shared = SharedPrefill(decode.model)
    assert [name for name, _ in decode.model.named_modules()] == names
    assert not any(isinstance(module, AdaptedLinear) for module in decode.model.modules())
    assert sum(isinstance(module, AdaptedLinear) for module in shared.model.modules()) == 14
    ours = {tensor.data_ptr() for tensor in shared.model.parameters()}
    assert ours == {tensor.data_ptr() for tensor in decode.model.parameters()}


def test_blocks_for_decode_steps_are_not_in_prefill(base_directory):
    decode = qsun.load_decode(base_directory, "cpu", "float32")
    expected = kv(decode.model, PROMPTS)
    architecture = architecture_of("llama")
    for index, block in enumerate(decode.model.model.layers):
        decode.model.model.layers[index] = FusedBlock(block, index, architecture, None)
    shared = SharedPrefill(decode.model)
    assert not any(isinstance(module, FusedBlock) for module in shared.model.modules())
    torch.testing.assert_close(kv(shared.model, PROMPTS), expected, rtol=0, atol=0)


def test_a_pass_that_fails_leaves_no_adapter_behind(base_directory, tmp_path):
    decode = qsun.load_decode(base_directory, "cpu", "float32")
    module = AdapterLibrary(decode).open(write_adapter(tmp_path / "a", base_directory, 0))
    with pytest.raises(IndexError), module.shared.rows([module.load()]):
        kv(module.shared.model, [[100_000]])
    torch.testing.assert_close(kv(module.shared.model, PROMPTS), kv(decode.model, PROMPTS), rtol=0, atol=0)
