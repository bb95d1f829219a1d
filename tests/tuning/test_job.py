"""What a checked request promises: memory, rates, and a teacher that is what it was."""

import json
import shutil

import pytest
import torch

import qsun
from qsun.model.output_dir import Workdir
from qsun.runtime.decode_module import load_decode
from qsun.tuning.job import prepare_tuning
from qsun.tuning.models import make_trainable
from qsun.tuning.processes import Processes
from qsun.tuning.tuner import Tuner
from tests.tiny_models import write_jsonl
from tests.tuning.test_tuner import FAST, sums


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "few.jsonl", sums(40))


@pytest.fixture(scope="module")
def int4(talking_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("decode") / "int4"
    qsun.quantize(talking_model, out, qsun.QuantConfig(method="rtn", group_size=32))
    return out


def unique_bytes(tensors):
    stored = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in stored}.values())


@pytest.mark.parametrize(
    ("quantized", "settings"),
    [
        (False, {}),
        (False, {"dtype": "bfloat16"}),
        (False, {"baseline": "full"}),
        (True, {"dtype": "bfloat16", "lora_rank": 4}),
        (True, {"lora_rank": 4, "prefill_weights": "decode"}),
    ],
)
def test_the_memory_of_a_plan_is_what_a_step_holds(
    quantized, settings, talking_model, int4, few, tmp_path, monkeypatch
):
    monkeypatch.setattr("qsun.runtime.decode_module.available_bytes", lambda _: 0)  # no room for dequantized copies
    decode = int4 if quantized else talking_model
    job = prepare_tuning(decode, tmp_path / "out", few, FAST.replace(**settings), device="cpu")
    with Workdir(job.out, job.settings(), resume=False) as work:
        tuner = Tuner(job, work, Processes(job.device))
        tuner.train_step()
    models, optimizer = [tuner.models.model, tuner.models.decode], tuner.optimizer
    weights = unique_bytes(t for model in models for t in (*model.parameters(), *model.buffers()))
    masters = list(optimizer.masters.values())
    parameters = list(optimizer.parameters.values())
    own = [master for master in masters if not any(master is p for p in parameters)]
    moments = [t for master in masters for t in optimizer.adamw.state[master].values()]
    held = weights + unique_bytes([*own, *moments, *(master.grad for master in masters)])
    held += sum(p.numel() * p.element_size() for p in parameters) if own else 0  # gradients that were passed on
    # of a model as small as this, the scales count: 16 bits in the file, 32 where the computation is float32
    assert held * (0.8 if quantized else 0.95) <= job.plan()["memory_bytes"] <= held * 1.15


def test_processes_share_the_optimizers_memory(talking_model, few, tmp_path):
    job = prepare_tuning(talking_model, tmp_path / "out", few, FAST.replace(dtype="bfloat16"), device="cpu")
    alone, four = (job.plan(count)["memory_bytes"] for count in (1, 4))
    assert alone - four == tuned_weights(job)[0] * 16 * 3 / 4


def tuned_weights(job):
    """Return the weights that are tuned, and those of an adapter that are not."""
    model = load_decode(job.base, "cpu", merge=False, fuse=False).model
    make_trainable(model, job)
    idle = (p.numel() for name, p in model.named_parameters() if ".lora_" in name and not p.requires_grad)
    return sum(p.numel() for p in model.parameters() if p.requires_grad), sum(idle)


@pytest.mark.parametrize("settings", [{}, {"baseline": "full"}, {"lora_rank": 4}, {"lora_rank": 2, "baseline": "full"}])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_plan_counts_tied_weights_once_and_what_is_tuned_as_tuned(
    family, settings, tiny_model, talking_model, few, tmp_path
):
    """A prefill module's KV depends on neither the head nor the last layer's q, o and MLP."""
    base = shutil.copytree(tiny_model(family), tmp_path / "base")
    for file in talking_model.glob("tokenizer*"):
        shutil.copy(file, base)
    job = prepare_tuning(base, tmp_path / "out", few, FAST.replace(dtype="bfloat16", **settings), device="cpu")
    weights = sum(p.numel() for p in load_decode(base, "cpu").model.parameters())
    assert job.plan()["weights"] == weights
    (tuned, idle), adapter = tuned_weights(job), job.tunes_adapter
    alone, four = (job.plan(count)["memory_bytes"] for count in (1, 4))
    assert alone - four == tuned * ((8 if adapter else 16) - 4)  # alone, an adapter's weights are their own masters
    shared = prepare_tuning(base, job.out, few, job.config.replace(shard=True), device="cpu").plan()["shared_bytes"]
    head = 0 if family == "qwen2" or job.config.fine_tune else 128 * 64  # which a prefill module does without
    models = (1 if job.config.fine_tune else 2) * weights - head
    assert shared == 2 * (models if adapter else models - tuned) + 16 * tuned + 4 * idle


def test_an_adapter_that_is_tuned_further_has_an_adapters_rate(talking_model, few, tmp_path):
    qsun.tune(talking_model, tmp_path / "adapter", few, FAST.replace(lora_rank=2, steps=1), device="cpu")
    config = qsun.TuneConfig(steps=1)
    fresh = prepare_tuning(talking_model, tmp_path / "a", few, config.replace(lora_rank=2), device="cpu")
    further = prepare_tuning(talking_model, tmp_path / "b", few, config, init=tmp_path / "adapter", device="cpu")
    assert further.peak_lr == fresh.peak_lr


def test_a_teacher_whose_decode_module_was_replaced_is_refused(talking_model, int4, few, tmp_path):
    decode, teacher = tmp_path / "decode", tmp_path / "teacher"
    shutil.copytree(int4, decode)
    qsun.tune(decode, teacher, few, FAST.replace(steps=1), base=talking_model, device="cpu")
    prepare_tuning(int4, tmp_path / "out", few, FAST, base=talking_model, teacher=teacher, device="cpu")
    shutil.rmtree(decode)
    qsun.quantize(talking_model, decode, qsun.QuantConfig(method="rtn", bits=2, group_size=32))
    with pytest.raises(qsun.QsunError, match="was tuned against another decode module than the one that is now"):
        prepare_tuning(int4, tmp_path / "out", few, FAST, base=talking_model, teacher=teacher, device="cpu")
    made = json.loads((teacher / "qsun.json").read_text())
    del made["decode_fingerprint"]  # as other tools' manifests
    (teacher / "qsun.json").write_text(json.dumps(made))
    prepare_tuning(int4, tmp_path / "out", few, FAST, base=talking_model, teacher=teacher, device="cpu")


def test_float16_gradients_do_not_shrink_with_the_batch(talking_model, few, tmp_path):
    """Those of activations are a share of 1/256, however many tokens a step has; those of weights are the mean's."""
    found = {}
    for dtype in ("float32", "float16"):
        job = prepare_tuning(talking_model, tmp_path / dtype, few, FAST.replace(dtype=dtype), device="cpu")
        with Workdir(job.out, job.settings(), resume=False) as work:
            tuner = Tuner(job, work, Processes(job.device))
        loss_of, seen = tuner.models.loss, []

        def watched(batch, loss_of=loss_of, seen=seen):
            loss = loss_of(batch)
            loss.register_hook(lambda gradient: seen.append(float(gradient)))
            return loss

        tuner.models.loss = watched
        tuner.gradients(job.train)
        found[dtype] = torch.cat([master.grad.flatten() for master in tuner.optimizer.masters.values()])
        tokens = sum(len(example.response) for example in job.train)
        assert seen == [pytest.approx(1 / (256 if dtype == "float16" else tokens))] * len(seen)
    assert tokens != 256
    assert torch.linalg.vector_norm(found["float16"] - found["float32"]) < 0.02 * found["float32"].norm()


def test_data_of_several_processes_cannot_be_a_pipe(tmp_path, monkeypatch, pipe):
    """Each would read a part of it."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(qsun.QsunError, match=r"training file .* is a pipe, which can be read only once"):
        prepare_tuning("demo", tmp_path / "out", pipe())
