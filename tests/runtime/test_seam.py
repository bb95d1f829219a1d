"""The seam: the quantized model's activations at decode positions are what a decode module computes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from qsun.data.calibration import Sample
from qsun.model.architectures import Architecture, architecture_of
from qsun.model.checkpoint import Checkpoint
from qsun.model.skeleton import Skeleton
from qsun.quantization import activations as stream_module
from qsun.quantization.activations import Activations, Batch, make_batches
from qsun.runtime.kv_cache import CACHE_ARGUMENT
from tests.tiny_models import FAMILIES, random_tokens, reference

CPU = torch.device("cpu")
EXACT = {"rtol": 1e-5, "atol": 2e-5}
#
# Oracle: transformers with a real KV cache. The full-precision model prefills t0 .. t(n-2); the quantized model reads
# the rest from that cache. No padding, no batch, no stages.

LENGTHS = [(24, 15), (9, 8), (15, 0), (24, 1), (20, 13), (2, 1)]  # tokens, of which prefill reads


def seam_samples() -> tuple[Sample, ...]:
    rows = random_tokens(len(LENGTHS), 24).tolist()
    return tuple(Sample(tuple(row[:length]), prefill) for row, (length, prefill) in zip(rows, LENGTHS, strict=True))


def perturbed(model: Any) -> Any:
    """A model as far from the full-precision one as a 2- or 3-bit module is."""
    torch.manual_seed(5)
    other = copy.deepcopy(model)
    for layer in other.model.layers:
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3 * parameter.std())
    return other


def decode_states(full: Any, ours: Any, architecture: Architecture, sample: Sample, stepwise: bool) -> dict[str, Any]:
    """Outputs of every block and inputs of every stage of `ours`, (decode positions, features) each."""
    cache, tokens = DynamicCache(config=full.config), torch.tensor([sample.tokens])
    if sample.prefill_tokens:
        full(tokens[:, : sample.prefill_tokens], use_cache=True, **{CACHE_ARGUMENT: cache})
    seen: dict[str, list[torch.Tensor]] = {}
    handles = []
    for index, layer in enumerate(ours.model.layers):
        handles.append(
            layer.register_forward_hook(
                lambda _, __, out, key=f"{index}": seen.setdefault(key, []).append(
                    out[0] if isinstance(out, tuple) else out
                )
            )
        )
        for number, stage in enumerate(architecture.stages):
            handles.append(
                layer.get_submodule(stage.layers[0]).register_forward_pre_hook(
                    lambda _, args, key=f"{index}.{number}": seen.setdefault(key, []).append(args[0])
                )
            )
    rest = tokens[:, sample.prefill_tokens :]
    for piece in rest.split(1, dim=1) if stepwise else [rest]:
        ours(piece, use_cache=True, **{CACHE_ARGUMENT: cache})
    for handle in handles:
        handle.remove()
    return {key: torch.cat(pieces, 1)[0] for key, pieces in seen.items()}


def rows_of(batches: list[Batch], sample: Sample) -> tuple[int, int]:
    """Batch and row that hold a sample."""
    for number, batch in enumerate(batches):
        for row in range(len(batch.tokens)):
            end = int(batch.prefilled[row].sum() + batch.counted[row].sum())
            if tuple(batch.tokens[row, :end].tolist()) == sample.tokens:
                return number, row
    raise AssertionError("the sample is in no batch")


def two_activations(directory: Path, ours: Any) -> tuple[Activations, Activations, list[torch.nn.Module]]:
    skeleton = Skeleton(Checkpoint(directory), torch.float32, CPU)
    batches = make_batches(seam_samples(), CPU)
    hidden = skeleton.embed([batch.tokens for batch in batches])
    quantized, full = Activations(skeleton, batches, hidden), Activations(skeleton, batches, list(hidden))
    quantized.attend_to(full)
    blocks = []
    for index, layer in enumerate(ours.model.layers):
        blocks.append(skeleton.fill(skeleton.layers[index], layer.state_dict()))
    return quantized, full, blocks


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens_per_batch", [4096, 48], ids=["one batch", "many batches"])
def test_decode_positions_are_those_of_a_decoder_with_a_prefilled_cache(
    family, tokens_per_batch, tiny_model, monkeypatch
):
    monkeypatch.setattr(stream_module, "TOKENS_PER_BATCH", tokens_per_batch)
    directory, architecture = tiny_model(family), architecture_of(family)
    with torch.no_grad():
        model = reference(directory)
        ours = perturbed(model)
        quantized, full, blocks = two_activations(directory, ours)
        expected = [decode_states(model, ours, architecture, s, stepwise=False) for s in seam_samples()]
        for index, block in enumerate(blocks):
            full.start_block(index, quantized.skeleton.load_block(index))
            quantized.start_block(index, block)
            for number in range(4):
                inputs = [quantized.stage_input(number, b) for b in range(len(quantized.batches))]
                compare(quantized.batches, inputs, expected, f"{index}.{number}")
            quantized.finish_block()
            full.finish_block()
            compare(quantized.batches, quantized.hidden, expected, f"{index}")


def compare(batches: list[Batch], found: list[torch.Tensor], expected: list[dict[str, torch.Tensor]], key: str) -> None:
    for sample, wanted in zip(seam_samples(), expected, strict=True):
        number, row = rows_of(batches, sample)
        got = found[number][row][batches[number].counted[row]]
        torch.testing.assert_close(got, wanted[key], **EXACT, msg=lambda m, s=sample: f"{key}, {s.prefill_tokens}: {m}")


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_token_by_token_decoding_gives_the_same(family, tiny_model):
    """The oracle itself: reading the response at once, or one token after another as an engine does."""
    with torch.no_grad():
        model = reference(tiny_model(family))
        ours = perturbed(model)
        for sample in seam_samples():
            at_once, stepwise = (decode_states(model, ours, architecture_of(family), sample, s) for s in (False, True))
            for key, value in at_once.items():
                torch.testing.assert_close(stepwise[key], value, **EXACT)


def test_the_prompts_kv_matters(tiny_model):
    """Without attend_to the quantized model attends to its own prompt, and the comparison above must see that."""
    directory = tiny_model("llama")
    with torch.no_grad():
        model = reference(directory)
        ours = perturbed(model)
        quantized, _, blocks = two_activations(directory, ours)
        alone = Activations(quantized.skeleton, quantized.batches, list(quantized.hidden))
        for index, block in enumerate(blocks):
            alone.start_block(index, block)
            alone.finish_block()
        expected = [decode_states(model, ours, architecture_of("llama"), s, stepwise=False) for s in seam_samples()]
        with pytest.raises(AssertionError):
            compare(alone.batches, alone.hidden, expected, f"{len(blocks) - 1}")


def test_batches_count_decode_positions_only():
    (batch,) = make_batches((Sample((5, 6, 7, 8, 9), 2), Sample((5, 6, 7), 0), Sample((5, 6), 1)), CPU)
    assert batch.tokens.tolist() == [[5, 6, 0, 0, 0], [5, 6, 7, 0, 0], [5, 6, 7, 8, 9]]
    assert batch.counted.int().tolist() == [[0, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]]
    assert batch.prefilled.int().tolist() == [[1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]]


def test_batches_hold_at_most_the_limit_and_every_sample_once(monkeypatch):
    monkeypatch.setattr(stream_module, "TOKENS_PER_BATCH", 20)
    lengths = [3, 9, 4, 9, 1, 30, 6]
    batches = make_batches(tuple(Sample(tuple(range(10, 10 + n))) for n in lengths), CPU)
    assert sorted(int(row.sum()) for batch in batches for row in batch.counted) == sorted(lengths)
    assert all(batch.tokens.numel() <= 20 or len(batch.tokens) == 1 for batch in batches)
