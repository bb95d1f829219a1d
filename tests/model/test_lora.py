"""LoRA prefill modules against peft: each loads the other's adapters, with the same logits."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qsun
from tests.tiny_models import FAMILIES, write_jsonl
from tests.tuning.test_tuner import FAST, sums

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
IDS = torch.tensor([[5, 6, 7, 8, 99]])


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "few.jsonl", sums(40))


@pytest.fixture(scope="module")
def adapter(talking_model, few, tmp_path_factory):
    out = tmp_path_factory.mktemp("lora") / "out"
    return out, qsun.tune(talking_model, out, few, FAST.replace(lora_rank=3), device="cpu")


def test_ours_loads_in_peft(adapter, talking_model):
    out, report = adapter
    assert report["best_valid_loss"] < report["valid_loss"][0][1]
    base = AutoModelForCausalLM.from_pretrained(talking_model, dtype=torch.float32)
    with torch.no_grad():
        plain = base(IDS).logits
        theirs = peft.PeftModel.from_pretrained(base, out)(IDS).logits
        ours = qsun.load_prefill(out, dtype="float32", device="cpu").model(IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - plain).abs().max() > 0.05


def test_it_is_small_and_names_its_base(adapter, talking_model):
    out, _ = adapter
    assert not (out / "model.safetensors").exists()
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(talking_model)
    made = json.loads((out / "qsun.json").read_text())
    assert made["kind"] == "prefill_module"
    decode = qsun.load_decode(talking_model, dtype="float32", device="cpu")
    prefill = qsun.load_prefill(out, decode)
    assert prefill.model.dtype == torch.bfloat16  # the base's own
    assert qsun.generate(prefill, decode, ["Tom>"], max_new_tokens=3, eos=()) != [""]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rslora", [False, True])
def test_theirs_loads_here(family, rslora, tiny_model, tmp_path):
    directory = tiny_model(family)
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    targets = ["qkv_proj", "o_proj"] if family == "phi3" else ["q_proj", "v_proj", "down_proj"]
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=targets, use_rslora=rslora, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(base, config)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = qsun.load_prefill(tmp_path / "adapter", device="cpu").model
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs.eval()(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inside", ["model.language_model.", "language_model.model."])
def test_an_adapter_of_a_multimodal_models_text(inside, adapter, talking_model, few, tmp_path):
    """peft names layers as they are in the whole model: of transformers from 4.52 on, or before."""
    directory, file = copied(adapter[0], tmp_path / "adapter"), "adapter_model.safetensors"
    tensors = load_file(directory / file)
    save_file(
        {name.replace("base_model.model.model.", f"base_model.model.{inside}"): t for name, t in tensors.items()},
        directory / file,
    )
    assert not load_file(directory / file).keys() & tensors.keys()
    with torch.no_grad():
        ours, theirs = (qsun.load_prefill(d, device="cpu").model(IDS).logits for d in (directory, adapter[0]))
    assert torch.equal(ours, theirs)


def test_inspect_describes_an_adapter(adapter, talking_model, cli):
    answer = cli("inspect", adapter[0])
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.splitlines()[0] == f"{adapter[0]}: prefill module, LoRA adapter of {talking_model}"
    assert "rank 3, scale 2, on 14 linear layers" in answer.out
    found = json.loads(cli("inspect", adapter[0], "--json").out)
    assert (found["rank"], found["scale"], found["base"]) == (3, 2.0, str(talking_model))


def test_an_adapter_is_tuned_on_as_an_adapter(adapter, talking_model, few, tmp_path):
    out, before = adapter
    report = qsun.tune(talking_model, tmp_path / "more", few, FAST, init=out, device="cpu")
    assert report["valid_loss"][0][1] == pytest.approx(before["best_valid_loss"], rel=1e-3)
    assert (tmp_path / "more" / "adapter_model.safetensors").exists()
    made, first = (json.loads((d / "qsun.json").read_text()) for d in (tmp_path / "more", out))
    assert made["lineage"] == [first["fingerprint"]]


def copied(out, target):
    target.mkdir()
    for file in out.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_dora": True}, "use_dora True is not plain LoRA"),
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\] is not plain LoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not plain LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4' is not plain LoRA"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights 'corda'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq'"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights 'lora_ga'"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is not read"),
        ({"r": 2}, "not of rank 2"),
        ({"lora_alpha": "x"}, "are not a rank and a scale"),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
        ({"base_model_name_or_path": "/nowhere/base"}, "is an adapter of /nowhere/base, which was not found"),
        ({"base_model_name_or_path": "demo"}, "is not the base that the adapter .* was tuned on"),
    ],
)
def test_an_adapter_that_is_not_ours_to_read(changes, says, adapter, tmp_path):
    directory = copied(adapter[0], tmp_path / "copy")
    values = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(values | changes))
    with pytest.raises(qsun.QsunError, match=says):
        qsun.load_prefill(directory, device="cpu")


def test_weights_that_have_no_place(adapter, tmp_path):
    directory = copied(adapter[0], tmp_path / "copy")
    tensors = load_file(directory / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_A" in name)
    save_file(
        tensors | {name.replace("layers.0", "layers.7"): tensors[name].clone()}, directory / "adapter_model.safetensors"
    )
    with pytest.raises(qsun.QsunError, match=r"layers\.7"):
        qsun.load_prefill(directory, device="cpu")
    for odd in ("base_model.model.model.embed_tokens.lora_embedding_A", "base_model.model.lm_head.weight"):
        save_file(tensors | {odd: torch.ones(4, 8)}, directory / "adapter_model.safetensors")
        with pytest.raises(qsun.QsunError, match=f"has {odd}, which is not lora_A or lora_B of a linear layer"):
            qsun.load_prefill(directory, device="cpu")
    (directory / "adapter_model.safetensors").unlink()
    with pytest.raises(qsun.QsunError, match="pickled adapters are not read"):
        qsun.load_prefill(directory, device="cpu")
