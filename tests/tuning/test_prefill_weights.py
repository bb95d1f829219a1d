"""Adapters on the decode module's own weights: what is tuned, which pairs fit, and what reads prompts afterwards."""

import json
import logging
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qsun
from qsun.model.output_dir import Workdir
from qsun.model.pairing import differences
from qsun.runtime.decode_module import dequantize_layers
from qsun.tuning.job import prepare_tuning
from qsun.tuning.output import write_module
from qsun.tuning.processes import Processes
from qsun.tuning.tuner import Tuner
from tests.tiny_models import write_jsonl
from tests.tuning.test_tuner import FAST, same_curve, sums
from tests.tuning.tune_in_parallel import held_bytes, in_two_processes

ON_DECODE = FAST.replace(lora_rank=3, prefill_weights="decode")
IDS = torch.tensor([[5, 6, 7, 8, 99]])


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "few.jsonl", sums(40))


@pytest.fixture(scope="module")
def decoders(talking_model, tmp_path_factory):
    """Decode modules of one base, of several bits."""
    made = {}
    for bits in (2, 4):
        made[bits] = tmp_path_factory.mktemp("decode") / f"int{bits}"
        qsun.quantize(talking_model, made[bits], qsun.QuantConfig(method="rtn", bits=bits, group_size=32))
    return made


@pytest.fixture(scope="module")
def dense(talking_model, decoders, tmp_path_factory):
    """The 2-bit decode module, written out as a plain float32 model."""
    out = tmp_path_factory.mktemp("dense") / "model"
    model = qsun.load_decode(decoders[2], "cpu", "float32").model
    dequantize_layers(model)
    model.save_pretrained(out)
    for pattern in ("tokenizer*", "chat_template*"):
        for file in talking_model.glob(pattern):
            shutil.copyfile(file, out / file.name)
    return out


@pytest.fixture(scope="module")
def adapter(decoders, few, tmp_path_factory):
    out = tmp_path_factory.mktemp("lora") / "out"
    return out, qsun.tune(decoders[2], out, few, ON_DECODE, device="cpu")


def manifest(directory):
    return json.loads((directory / "qsun.json").read_text())


def test_it_is_tuned_as_on_the_weights_written_out(adapter, dense, few, tmp_path):
    """Oracle: the same run on a full-precision decode module of the same values."""
    report = qsun.tune(dense, tmp_path / "dense", few, ON_DECODE, device="cpu")
    same_curve(adapter[1], report)
    ours, theirs = (load_file(d / "adapter_model.safetensors") for d in (adapter[0], tmp_path / "dense"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_it_learns_and_is_read_back(adapter):
    _, report = adapter
    assert report["best_valid_loss"] < report["valid_loss"][0][1]
    assert report["saved_valid_loss"] == pytest.approx(report["best_valid_loss"], rel=1e-4)


def test_prompts_are_read_with_these_weights_and_the_adapter(adapter, decoders, dense):
    """Oracle: peft puts it on the weights written out."""
    peft = pytest.importorskip("peft")
    decode = qsun.load_decode(decoders[2], "cpu", "float32")
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    with torch.no_grad():
        plain = model(IDS).logits
        theirs = peft.PeftModel.from_pretrained(model, adapter[0])(IDS).logits
        for prefill in (
            qsun.load_prefill(adapter[0], decode, "float32"),
            qsun.load_prefill(adapter[0], dtype="float32", device="cpu"),
        ):
            torch.testing.assert_close(prefill.model(IDS).logits, theirs, rtol=1e-4, atol=1e-4)
    assert (theirs - plain).abs().max() > 0.05
    assert not any(isinstance(m, qsun.QuantLinear) for m in prefill.model.modules())


def test_the_manifest_names_the_weights(adapter, decoders, talking_model, few, tmp_path):
    made = manifest(adapter[0])
    assert made["prefill_weights"] == "decode"
    assert made["prefill_weights_fingerprint"] == made["decode_fingerprint"] != made["base_fingerprint"]
    config = json.loads((adapter[0] / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(decoders[2])
    qsun.tune(decoders[2], tmp_path / "plain", few, FAST.replace(lora_rank=3, steps=1), device="cpu")
    made = manifest(tmp_path / "plain")
    assert made["prefill_weights"] == "base"
    assert made["prefill_weights_fingerprint"] == made["base_fingerprint"]
    assert differences(tmp_path / "plain", decoders[4]) == []


def test_it_fits_its_own_decode_module_only(adapter, decoders, talking_model, cli):
    assert differences(adapter[0], decoders[2]) == []
    for other in (decoders[4], talking_model):
        found = differences(adapter[0], other)
        assert len(found) == 1
        assert found[0].startswith("fingerprint of the weights under the adapter is ")
        with pytest.raises(qsun.QsunError, match="use the decode module that it was tuned on"):
            qsun.load_prefill(adapter[0], qsun.load_decode(other, "cpu"))
    answer = cli("generate", decoders[4], "--prefill", adapter[0], "Tom has 4>")
    assert answer.code == 2 and len(answer.err.splitlines()) == 1


def test_answers_on_the_command_line(adapter, decoders, cli):
    answer = cli(
        "generate", decoders[2], "--prefill", adapter[0], "Tom has 4>", "--max-tokens", 4, "--dtype", "float32"
    )
    assert answer.code == 0, answer.err
    decode = qsun.load_decode(decoders[2], "cpu", "float32")
    prefill = qsun.load_prefill(adapter[0], decode, "float32")
    assert answer.out == qsun.generate(prefill, decode, ["Tom has 4>"], max_new_tokens=4)[0] + "\n"


def test_a_decode_module_may_be_moved(adapter, decoders, tmp_path):
    """The name in the adapter is only used where no decode module is given."""
    moved, there = tmp_path / "moved", tmp_path / "adapter"
    shutil.copytree(decoders[2], moved)
    shutil.copytree(adapter[0], there)
    values = json.loads((there / "adapter_config.json").read_text())
    (there / "adapter_config.json").write_text(json.dumps(values | {"base_model_name_or_path": "/nowhere/decode"}))
    assert qsun.load_prefill(there, qsun.load_decode(moved, "cpu"))
    with pytest.raises(qsun.QsunError, match="is an adapter of /nowhere/decode, which was not found"):
        qsun.load_prefill(there, device="cpu")
    (there / "adapter_config.json").write_text(json.dumps(values | {"base_model_name_or_path": str(decoders[4])}))
    with pytest.raises(qsun.QsunError, match="is not the decode module that the adapter"):
        qsun.load_prefill(there, device="cpu")


def test_tuning_further_on_other_weights(adapter, decoders, few, tmp_path):
    out, first = adapter
    again = qsun.tune(decoders[2], tmp_path / "same", few, FAST.replace(lr=1e-4), init=out, device="cpu")
    assert again["valid_loss"][0][1] == pytest.approx(first["best_valid_loss"], rel=1e-3)
    qsun.tune(decoders[4], tmp_path / "other", few, FAST.replace(steps=1), init=out, device="cpu")
    made = manifest(tmp_path / "other")
    assert (made["prefill_weights"], made["lineage"]) == ("decode", [manifest(out)["fingerprint"]])
    assert differences(tmp_path / "other", decoders[4]) == []
    assert differences(tmp_path / "other", decoders[2]) != []


def test_from_the_base_to_the_decode_modules_weights(decoders, few, tmp_path):
    qsun.tune(decoders[2], tmp_path / "base", few, FAST.replace(lora_rank=2, steps=1), device="cpu")
    config = FAST.replace(prefill_weights="decode", steps=1)
    qsun.tune(decoders[2], tmp_path / "moved", few, config, init=tmp_path / "base", device="cpu")
    assert manifest(tmp_path / "moved")["prefill_weights"] == "decode"


def test_the_weights_are_held_once(decoders, few, tmp_path):
    both = held_bytes(decoders[4], tmp_path / "a", few, FAST.replace(lora_rank=2))
    one = held_bytes(decoders[4], tmp_path / "b", few, ON_DECODE.replace(lora_rank=2))
    model = qsun.load_decode(decoders[4], "cpu", "float32").model
    alone = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert one < both / 2
    assert alone < one < 1.5 * alone


def test_what_is_read_back_takes_the_place_of_what_was_tuned(decoders, dense, few, tmp_path, monkeypatch):
    """Of an adapter on the decode module's weights only the adapter is loaded; of a fine-tune, after its release."""
    released = []

    def watched(directory, *arguments, **settings):
        released.append(watched.model() is None)
        return qsun.load_prefill(directory, *arguments, **settings)

    monkeypatch.setattr("qsun.tuning.models.load_prefill", watched)
    ways = {decoders[2]: ON_DECODE.replace(steps=2), dense: FAST.replace(steps=2, baseline="full")}
    for number, (decode, config) in enumerate(ways.items()):
        job = prepare_tuning(decode, tmp_path / str(number), few, config, device="cpu")
        with Workdir(job.out, job.settings(), resume=False) as work:
            tuner = Tuner(job, work, Processes(job.device))
            tuner.run(lambda *_: None)
            write_module(job, work, tuner.state.best(), tuner.models.adapter)
            watched.model = weakref.ref(tuner.models.model)
            saved = tuner.loss_of_saved(work.module)
        assert watched.model() is None
        assert saved == pytest.approx(min(loss for _, loss in tuner.valid_loss), rel=1e-4)
        assert len(released) == number and all(released)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "no lora_rank is given; add lora_rank, or use prefill_weights base"),
        (("--init", "demo"), "init demo is a full module; add lora_rank"),
        (("--baseline", "full", "--lora-rank", 4), "tunes the full-precision base; leave prefill_weights decode out"),
        (("--lora-rank", 4, "--prefill-weights", "int4"), "use base or decode"),
        (
            ("--lora-rank", 4, "--lora-targets", "q_proj,up"),
            "LoRA target 'up' is not a linear layer of a llama; use q_proj",
        ),
        (("--prefill-weights", "base", "--lora-alpha", 8), "lora_alpha has no effect without a LoRA adapter"),
        (("--prefill-weights", "base", "--lora-targets", "q_proj"), "lora_targets has no effect"),
    ],
)
def test_settings_that_contradict_each_other(options, says, cli, few, tmp_path):
    asked = ("tune", "demo", "-o", tmp_path / "out", "--data", few, "--prefill-weights", "decode")
    answer = cli(*asked, *options)
    assert answer.code == 2
    assert says in answer.err and len(answer.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("settings", "alpha", "scale"),
    [({}, 8, 2.0), ({"lora_alpha": 12.0}, 12, 3.0), ({"lora_rslora": True}, 8, 4.0)],
)
def test_scale_and_targets(settings, alpha, scale, talking_model, few, tmp_path):
    config = FAST.replace(lora_rank=4, lora_targets=["k_proj", "v_proj,down_proj"], **settings)
    qsun.tune(talking_model, tmp_path / "out", few, config, device="cpu")
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["target_modules"] == ["down_proj", "k_proj", "v_proj"]
    assert (written["lora_alpha"], written["use_rslora"]) == (alpha, config.lora_rslora)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 3  # A and B, layers, targets
    name = "model.layers.0.self_attn.v_proj"
    a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    base = qsun.load_decode(talking_model, "cpu", "float32").model.get_submodule(name).weight
    merged = qsun.load_prefill(tmp_path / "out", dtype="float32", device="cpu").model.get_submodule(name).weight
    torch.testing.assert_close(merged, base + scale * b @ a)


def test_an_ordinary_adapter_loads_with_a_warning(adapter, talking_model, tmp_path, caplog):
    shutil.copytree(adapter[0], tmp_path / "peft")
    (tmp_path / "peft" / "qsun.json").unlink()
    file = tmp_path / "peft" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(talking_model)}))
    with caplog.at_level(logging.WARNING, "qsun"):
        qsun.load_prefill(adapter[0], device="cpu")
        assert not caplog.records
        qsun.load_prefill(tmp_path / "peft", device="cpu")
    assert len(caplog.records) == 1
    assert "it acts on prompt tokens only" in caplog.text and "qsun tune --init" in caplog.text


@pytest.mark.slow
def test_two_processes_that_share_the_weights_out(decoders, few, adapter, tmp_path):
    run = {"base": decoders[2], "out": tmp_path / "out", "data": few, "shard": True}
    succeeded, said = in_two_processes(run | {"lora_rank": 3, "prefill_weights": "decode"})
    assert succeeded, said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    same_curve(report, adapter[1])
    assert report["saved_valid_loss"] == pytest.approx(report["best_valid_loss"], rel=1e-3)
