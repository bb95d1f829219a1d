"""Polish: gradients of scales against float64, its divergence against whole models, what is kept, resume, formats."""

import inspect
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import qsun
from qsun import memory
from qsun.config import LayerSpec
from qsun.data.calibration import Sample
from qsun.errors import QsunError
from qsun.model.checkpoint import Checkpoint
from qsun.model.formats import pack_layer, unpack_layer
from qsun.model.quantized import Quantized, digest
from qsun.model.stored_layers import quantized_layer_names, read_quantized_layer
from qsun.quantization import job as job_module
from qsun.quantization import lessons as lessons_module
from qsun.quantization import polish
from qsun.quantization.activations import TOKENS_PER_BATCH
from qsun.quantization.job import prepare
from qsun.quantization.lessons import make_lessons, teach
from qsun.quantization.scaled_linear import ScaledLinear
from qsun.runtime.quant_linear import QuantLinear
from tests.quantization.test_prefill_calibration import pairs, talking
from tests.quantization.test_resume import interrupt_at, published
from tests.tiny_models import FAMILIES, SEQUENCE, random_tokens, write_jsonl

K, N, ROWS = 192, 24, 5


def settings(**changes):
    """Without shrinkage, which leaves less to learn."""
    chosen = {"bits": 2, "group_size": 32, "samples": 24, "seq_len": 24, "shrinkage": 0.0, "polish": 12}
    return qsun.QuantConfig.from_dict(chosen | changes)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A base, a prefill module of other weights, and data."""
    root = tmp_path_factory.mktemp("polish")
    base, prefill = (talking(root / name, "llama", torch.float32, seed) for seed, name in enumerate(("base", "P")))
    return base, prefill, write_jsonl(root / "data.jsonl", pairs(24, seed=3))


def layer_of(group_size, bits, dtype, *, g_idx=False):
    groups = 1 if group_size == -1 else K // group_size
    q = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8)
    zeros = torch.randint(1, 2**bits, (groups, N), dtype=torch.uint8)
    scales = (torch.rand(groups, N) * torch.randn(groups, N).sign()).bfloat16().float()
    order = torch.arange(K, dtype=torch.int32).div(K // groups, rounding_mode="floor").int()[torch.randperm(K)]
    weights = Quantized(q, scales, zeros, order if g_idx else None)
    return QuantLinear(weights, torch.randn(N), bits, dtype)


@pytest.mark.parametrize("g_idx", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_float64(dtype, group_size, g_idx):
    layer = layer_of(group_size, 3, dtype, g_idx=g_idx)
    ours, x = ScaledLinear(layer, torch.bfloat16), torch.randn(2, ROWS, K, dtype=dtype, requires_grad=True)
    ours.gains.data.normal_(std=0.2)
    upstream = torch.randn(2, ROWS, N, dtype=dtype)
    ours(x).backward(upstream)

    weights, gains = layer.quantized(), ours.gains.detach().double().requires_grad_()
    rounded = (weights.scales * (1 + ours.gains.detach())).bfloat16().double()
    scales = rounded + weights.scales.double() * (gains - gains.detach())  # rounding passes gradients
    group = weights.g_idx.long() if g_idx else torch.arange(K).div(K // len(scales), rounding_mode="floor")
    dense = torch.stack(
        [(weights.q[:, k].double() - weights.zeros[group[k]].double()) * scales[group[k]] for k in range(K)], 1
    )
    x64 = x.detach().double().requires_grad_()
    expected = F.linear(x64, dense, layer.bias.double())
    expected.backward(upstream.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for found, wanted in ((ours(x), expected), (x.grad, x64.grad), (ours.gains.grad, gains.grad)):
        error = (found.double() - wanted).norm() / wanted.norm()
        assert error < tolerance


def test_scales_are_what_will_be_stored():
    ours = ScaledLinear(layer_of(32, 4, torch.float32), torch.bfloat16)
    assert torch.equal(ours.scales, ours.weights.scales)  # untouched at the start
    ours.gains.data.normal_(std=0.3)
    assert torch.equal(ours.scales, ours.scales.bfloat16().float())
    assert not torch.equal(ours.scales, ours.weights.scales)


@pytest.mark.parametrize("size", [1e-9, 3e-6, 1e-4, 1.0, 6e4])
def test_scales_of_a_bfloat16_base_are_what_the_file_holds(size):
    """Files hold fp16, whose smallest numbers are coarser than bfloat16's and whose largest are smaller."""
    ours = ScaledLinear(layer_of(32, 4, torch.float32), torch.bfloat16)
    ours.weights = ours.weights._replace(scales=ours.weights.scales * size)
    ours.gains.data.normal_(std=0.3)
    learned, spec = ours.weights._replace(scales=ours.scales.detach()), LayerSpec(4, 32, False)
    assert digest(unpack_layer(pack_layer(learned, spec, "gptq"), spec, "gptq")) == digest(learned)
    assert torch.equal(learned.scales, learned.scales.bfloat16().float())


@pytest.mark.parametrize("behind", ["base", "prefill"])
def test_the_divergence_is_that_of_whole_models(task, tmp_path, behind):
    """One sample at a time without padding: transformers prefills a cache, both decode modules read on from it.

    The tokens are those of the rows, up to the last one of the response: what follows it ends the answer.
    """
    base, prefill, data = task
    names = [str(prefill)] if behind == "prefill" else []
    qsun.quantize(base, tmp_path / "q", settings(polish=0), data, device="cpu", calibration_prefill=names)
    job = prepare(base, tmp_path / "unused", settings(), data, "cpu", calibration_prefill=names)
    lessons = make_lessons(job.calibration.samples)
    with torch.no_grad():
        teacher = teach(job.skeleton, names, lessons)
        decode = qsun.load_decode(tmp_path / "q", device="cpu", dtype="float32").model
        found = sum(float(lesson.loss(decode, teacher)) for lesson in lessons)

        full = qsun.load_decode(base, device="cpu", dtype="float32").model
        reader = qsun.load_prefill(prefill if behind == "prefill" else base, dtype="float32", device="cpu").model
        expected, tokens = 0.0, 0
        for number, row in enumerate(pairs(24, seed=3), 1):
            if number % 8 == 0:
                continue  # held out
            fed, start = [1, *map(ord, row["prompt"] + row["response"])], len(row["prompt"])
            ids = torch.tensor([fed[:24]])  # --seq-len
            logs = []
            for model in (full, decode):
                cache = reader(ids[:, :start], use_cache=True).past_key_values if start else None
                logs.append(model(ids[:, start:], past_key_values=cache).logits.log_softmax(-1)[0])
            expected += float((logs[0].exp() * (logs[0] - logs[1])).sum())
            tokens += ids.shape[1] - start
    assert tokens == sum(lesson.tokens for lesson in lessons)
    assert found == pytest.approx(expected, rel=1e-4)
    assert expected / tokens > 1e-3  # two bits differ


def test_long_prompts_are_read_a_few_at_a_time():
    """Whatever responses share a lesson, none reads more than a pass over calibration data does."""
    sizes = [(1000 + 7 * i, 1 + i % 5) for i in range(30)] + [(2, 1000 - i) for i in range(9)] + [(5000, 3)]
    samples = [Sample((5,) * (prompt + decode), prompt, 0 if prompt > 1100 else None) for prompt, decode in sizes]
    shapes = [(*lesson.batch.prefix.shape, lesson.batch.rest.shape[1]) for lesson in make_lessons(samples)]
    assert sum(rows for rows, _, _ in shapes) == len(samples)
    assert all(rows * (P + R) <= TOKENS_PER_BATCH for rows, P, R in shapes if rows > 1)
    assert max(rows for rows, _, _ in shapes) > 2
    assert sum(lesson.tokens for lesson in make_lessons(samples)) == sum(decode for _, decode in sizes)


@pytest.mark.parametrize("fmt", ["gptq", "compressed-tensors", "awq"])
def test_only_scales_change_and_the_divergence_falls(task, tmp_path, fmt, monkeypatch):
    base, prefill, data = task
    bits = 4 if fmt == "awq" else 2
    rate = polish._PEAK_RATE
    for name, steps in (("before", 24), ("after", 24)):
        monkeypatch.setattr(polish, "_PEAK_RATE", rate if name == "after" else 0.0)  # both hold the same samples out
        chosen = settings(format=fmt, bits=bits, polish=steps)
        report = qsun.quantize(base, tmp_path / name, chosen, data, device="cpu", calibration_prefill=[str(prefill)])
    curve, kept = report["polish"]["divergence"], report["polish"]["kept"]
    assert kept > 0
    assert dict(curve)[kept] == min(value for _, value in curve) < curve[0][1]
    before, after = (Checkpoint(tmp_path / name) for name in ("before", "after"))
    changed = 0
    for name in quantized_layer_names(after):
        features = 128 if "down_proj" in name else 64
        old, new = (read_quantized_layer(files, name, fmt, features)[0] for files in (before, after))
        assert torch.equal(old.q, new.q) and torch.equal(old.zeros, new.zeros)
        changed += not torch.equal(old.scales, new.scales)
    assert changed == 14


def test_an_interrupted_stage_goes_on_with_the_same_bytes(task, tmp_path, monkeypatch):
    base, prefill, data = task
    run = lambda out, **more: qsun.quantize(  # noqa: E731
        base, out, settings(), data, device="cpu", calibration_prefill=[str(prefill)], **more
    )
    whole = run(tmp_path / "whole")
    for step in (18, 26):  # in the first steps, and near the end
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", progress=interrupt_at(step), resume=step > 18)
    with monkeypatch.context() as patch:  # then while learned scales are written
        patch.setattr(polish, "digest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", resume=True)
    again = run(tmp_path / "cut", resume=True)
    assert again["polish"] == whole["polish"]
    assert published(tmp_path / "cut") == published(tmp_path / "whole")


def test_scales_stay_where_learning_does_not_help(task, tmp_path, monkeypatch):
    base, _, data = task
    monkeypatch.setattr(polish, "_PEAK_RATE", 30.0)
    report = qsun.quantize(base, tmp_path / "after", settings(), data, device="cpu")
    monkeypatch.setattr(polish, "_PEAK_RATE", 0.0)
    qsun.quantize(base, tmp_path / "before", settings(), data, device="cpu")
    assert report["polish"]["kept"] == 0
    assert max(value for _, value in report["polish"]["divergence"]) > report["polish"]["divergence"][0][1]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_scales_that_the_computation_would_round_stay_as_they_are_stored(task, tmp_path, monkeypatch):
    base, _, data = task
    monkeypatch.setattr(polish, "_PEAK_RATE", 30.0)
    before: list[dict] = []
    first = polish.polish_scales
    monkeypatch.setattr(
        "qsun.quantization.run.polish_scales",
        lambda job, work, tell: before.append(load_file(work.module / "model.safetensors")) or first(job, work, tell),
    )
    chosen = settings(polish=2, dtype="bfloat16", scale_dtype="float16")
    report = qsun.quantize(base, tmp_path / "out", chosen, data, device="cpu")
    assert report["polish"]["kept"] == 0
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before[0].items())
    scales = [tensor for name, tensor in after.items() if name.endswith(".scales")]
    assert any(not torch.equal(tensor, tensor.bfloat16().half()) for tensor in scales)


def test_freed_memory_is_given_back_as_lessons_are_taught_and_learned(task, tmp_path, monkeypatch):
    """Lessons have many shapes, and the heap would keep a hole of each."""
    base, prefill, data = task
    monkeypatch.setattr(memory, "_TRIM_EVERY", 2)
    monkeypatch.setattr(lessons_module, "_POSITIONS", 24)
    seen = []
    monkeypatch.setattr(memory, "release_freed", lambda: seen.append(inspect.stack()[2].function))
    qsun.quantize(base, tmp_path / "q", settings(polish=6), data, device="cpu", calibration_prefill=[str(prefill)])
    job = prepare(base, tmp_path / "unused", settings(), data, "cpu", calibration_prefill=[str(prefill)])
    lessons = make_lessons(job.calibration.held_out) + make_lessons(job.calibration.samples)
    read = sum(lesson.batch.prefix.shape[1] > 0 for lesson in lessons)
    assert seen.count("run") == 3
    assert seen.count("teach") >= len(lessons) // 2 + read // 2 - 1 > 4


def test_steps_that_only_harm_are_taken_back_and_made_smaller(task, tmp_path, monkeypatch):
    base, _, data = task
    monkeypatch.setattr(job_module, "hold_out", lambda found: replace(found, held_out=found.samples))
    monkeypatch.setattr(polish, "_PEAK_RATE", 1.0)
    report = qsun.quantize(base, tmp_path / "out", settings(polish=80), data, device="cpu")
    curve = [value for _, value in report["polish"]["divergence"]]
    assert curve[1] > curve[0]
    assert report["polish"]["slower"] >= 3
    assert report["polish"]["kept"] > 0
    assert min(curve) < curve[0]


def test_passes_see_no_held_out_sample(task, tmp_path):
    base, _, data = task
    with_polish, without = (
        prepare(base, tmp_path / "q", settings(polish=steps), data, "cpu").calibration for steps in (1, 0)
    )
    assert without.held_out == ()
    assert with_polish.held_out == without.samples[7::8]
    assert not set(with_polish.held_out) & set(with_polish.samples)
    assert set(with_polish.held_out) | set(with_polish.samples) == set(without.samples)


def test_a_real_model_gains_at_two_bits(tmp_path):
    """The packaged base; held-out text that neither the pass nor polish has seen.

    The last bits of products decide where coordinate descent ends: 0.87 to 0.92 in five orders of the same sums.
    """
    chosen = settings(samples=64, seq_len=128, polish=24, group_size=64)
    report = qsun.quantize("demo", tmp_path / "after", chosen, device="cpu")
    curve = [value for _, value in report["polish"]["divergence"]]
    assert min(curve) < 0.95 * curve[0]


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"llama"}))
def test_every_family_can_be_polished(family, tiny_model, tmp_path, monkeypatch):
    """The samples that scales learn from are measured too: little of random tokens carries over to others."""
    monkeypatch.setattr(job_module, "hold_out", lambda found: replace(found, held_out=found.samples))
    np.save(tmp_path / "tokens.npy", random_tokens(64, SEQUENCE))
    chosen = settings(polish=4, lm_head=True, samples=64)
    report = qsun.quantize(tiny_model(family), tmp_path / "out", chosen, tmp_path / "tokens.npy", device="cpu")
    curve = report["polish"]["divergence"]
    assert curve[-1][1] < curve[0][1]


def test_a_damaged_write_is_noticed(task, tmp_path, monkeypatch):
    base, _, data = task
    write = polish._write
    doubled = lambda job, work, scales: write(job, work, {name: 2 * s for name, s in scales.items()})  # noqa: E731
    monkeypatch.setattr(polish, "_write", doubled)
    with pytest.raises(QsunError, match="divergence"):
        qsun.quantize(base, tmp_path / "out", settings(), data, device="cpu")
    assert not (tmp_path / "out").exists()


def test_what_polish_cannot_use_is_refused(task, tmp_path):
    base, _, data = task
    with pytest.raises(QsunError, match="rtn uses none"):
        settings(method="rtn")
    with pytest.raises(QsunError, match="5 samples are too few"):
        qsun.quantize(base, tmp_path / "out", settings(samples=5), data, device="cpu")


def test_the_command(cli, task, tmp_path):
    base, _, data = task
    options = ("--bits", 2, "--group-size", 32, "--samples", 16, "--seq-len", 24, "--polish", 3, "--calib", data)
    plan = json.loads(cli("quantize", base, "-o", tmp_path / "out", *options, "--dry-run", "--json").out)
    assert plan["polish_steps"] == 3
    answer = cli("quantize", base, "-o", tmp_path / "out", *options)
    assert "polish: divergence of held-out samples" in answer.out
