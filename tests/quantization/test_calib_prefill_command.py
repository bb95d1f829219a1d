"""`qsun quantize --calib ... --calib-prefill ...`: what it says, what it records, and what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qsun
from qsun.model.checkpoint import Checkpoint
from qsun.model.lora import AdapterSettings, fresh_adapter, place_adapter, write_adapter
from tests.quantization.test_resume import interrupt_at
from tests.tiny_models import SEQUENCE, build_model, prompt_rows, write_jsonl

SETTINGS = ("--method", "gptq", "--bits", 2, "--group-size", 32, "--samples", 8, "--seq-len", SEQUENCE)


@pytest.fixture(scope="module")
def prefill(talking_model, tmp_path_factory) -> Path:
    """A prefill module: the base's files with other weights. Copy it before damaging it."""
    directory = tmp_path_factory.mktemp("prefill") / "P"
    shutil.copytree(talking_model, directory)
    return build_model(directory, "llama", torch.bfloat16, seed=3)


@pytest.fixture
def data(tmp_path) -> Path:
    return write_jsonl(tmp_path / "data.jsonl", prompt_rows(12))


@pytest.fixture
def refused(cli, talking_model, data, tmp_path):
    """Run the command with one calibration source; it must print one line on stderr and leave no files."""

    def run(*options: Any, says: str, source: Path | str = data) -> str:
        answer = cli("quantize", talking_model, "-o", tmp_path / "out", *SETTINGS, "--calib", source, *options)
        errors = [line for line in answer.err.splitlines() if not line.startswith("warning: ")]
        assert answer.code == 2 and answer.out == "" and len(errors) == 1
        assert says in errors[0]
        assert not list(tmp_path.glob("out*"))
        return errors[0]

    return run


def quantized(cli, base: Path, out: Path, *options: Any) -> Any:
    answer = cli("quantize", base, "-o", out, *SETTINGS, *options)
    assert answer.code == 0, answer.err
    return answer


def written_adapter(base: Path, directory: Path) -> Path:
    """A LoRA adapter with large changes, in the form that `qsun tune` writes."""
    directory.mkdir()
    model = qsun.load_decode(base, "cpu").model
    adapter = fresh_adapter(model, AdapterSettings(4, 8), seed=1)
    place_adapter(model, adapter)
    torch.manual_seed(5)
    tuned = {n: 0.2 * torch.randn_like(p) for n, p in model.named_parameters() if n.endswith("lora_B")}
    write_adapter(adapter, str(base), tuned, directory)
    made = {"kind": "prefill_module", "base_fingerprint": Checkpoint(base).fingerprint()}
    made["fingerprint"] = Checkpoint(directory / "adapter_model.safetensors").fingerprint()
    (directory / "qsun.json").write_text(json.dumps(made))
    return directory


# --- records


def test_manifest_report_and_card_name_the_prefill_modules(cli, talking_model, prefill, data, tmp_path):
    options = ("--calib", data, "--calib-prefill", prefill, "--calib", data, "--calib-prefill", talking_model)
    report = json.loads(quantized(cli, talking_model, tmp_path / "out", *options, "--json").out)
    expected = [
        {"calibration": str(data), "name": str(module), "fingerprint": Checkpoint(module).fingerprint()}
        for module in (prefill, talking_model)
    ]
    assert report["calibration"]["prefill_modules"] == expected
    assert json.loads((tmp_path / "out/qsun.json").read_text())["prefill_modules"] == expected
    card = (tmp_path / "out/README.md").read_text()
    assert f"{data} (prompts read by {prefill}), {data} (prompts read by {talking_model})" in card


def test_the_dry_run_counts_prefill_modules_and_their_tokens(cli, talking_model, prefill, data, tmp_path):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    prompt_tokens = sum(len(row["prompt"]) for row in rows)  # with <s>, without the last
    tokens = sum(len(row["prompt"] + row["response"]) + 1 for row in rows)
    options = ("--calib", data, "--calib-prefill", prefill, "--calib", data, "--calib-prefill", talking_model)
    answer = quantized(cli, talking_model, tmp_path / "out", *options, "--samples", 24, "--dry-run", "--json")
    plan = json.loads(answer.out)
    counted = (plan["prefill_modules"], plan["prefill_tokens"], plan["calibration_tokens"])
    assert counted == (1, prompt_tokens, 2 * tokens)
    answer = quantized(cli, talking_model, tmp_path / "out", *options, "--samples", 24, "--dry-run")
    assert f"prompt tokens read by 1 prefill modules: {prompt_tokens}" in answer.out
    answer = quantized(cli, talking_model, tmp_path / "out", "--calib", data, "--dry-run")
    assert "prefill modules" not in answer.out
    assert not list(tmp_path.glob("out*"))


def test_the_plan_counts_the_kv_of_prompts(cli, talking_model, prefill, tmp_path):
    long, short = (
        write_jsonl(tmp_path / f"{n}.jsonl", [{"prompt": "a" * n, "response": "b" * (22 - n)}]) for n in (20, 2)
    )
    peaks = []
    for source in (long, short):
        options = ("--calib", source, "--calib-prefill", prefill, "--dry-run", "--json")
        peaks.append(json.loads(quantized(cli, talking_model, tmp_path / "out", *options).out)["peak_ram_bytes"])
    numbers = 2 * 2 * 16 + 64  # K and V of two heads, and a hidden state
    assert peaks[0] - peaks[1] == 18 * numbers * 4


# --- LoRA adapters


@pytest.mark.parametrize("method", ["gptq", "refined"])
def test_an_adapter_reads_prompts_as_it_does_when_merged(method, cli, talking_model, data, tmp_path):
    adapter = written_adapter(talking_model, tmp_path / "adapter")
    merged = shutil.copytree(talking_model, tmp_path / "merged")
    qsun.load_prefill(adapter, device="cpu").model.save_pretrained(merged)
    files = {}
    for name, prefill in (("from-adapter", adapter), ("from-merged", merged), ("from-base", talking_model)):
        options = ("--calib", data, "--calib-prefill", prefill, "--method", method)
        quantized(cli, talking_model, tmp_path / name, *options)
        files[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert files["from-adapter"] == files["from-merged"] != files["from-base"]


@pytest.mark.parametrize("changes", [{"lora_alpha": 16}, {"use_rslora": True}])
def test_a_resumed_run_may_not_change_the_scale_of_an_adapter(changes, talking_model, data, tmp_path):
    """Its fingerprint, of tensors, stays the same."""
    adapter = written_adapter(talking_model, tmp_path / "A")
    config = qsun.QuantConfig(method="gptq", group_size=32, samples=6, seq_len=24)
    run = (talking_model, tmp_path / "out", config, data)
    with pytest.raises(KeyboardInterrupt):
        qsun.quantize(*run, calibration_prefill=[adapter], progress=interrupt_at(3))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(qsun.ResumeError, match="prefill_scales was"):
        qsun.quantize(*run, calibration_prefill=[adapter], resume=True)


def test_an_adapter_that_calibration_covered_is_known_by_its_own_fingerprint(cli, talking_model, data, tmp_path):
    adapter = written_adapter(talking_model, tmp_path / "adapter")
    quantized(cli, talking_model, tmp_path / "out", "--calib", data, "--calib-prefill", adapter, "--served", adapter)
    (recorded,) = json.loads((tmp_path / "out/qsun.json").read_text())["prefill_modules"]
    own = json.loads((adapter / "qsun.json").read_text())["fingerprint"]
    assert (recorded["name"], recorded["fingerprint"]) == (str(adapter), own)
    other = shutil.copytree(adapter, tmp_path / "other")
    tensors = load_file(other / "adapter_model.safetensors")
    save_file({n: 2 * t for n, t in tensors.items()}, other / "adapter_model.safetensors", {"format": "pt"})
    made = json.loads((other / "qsun.json").read_text())
    del made["fingerprint"]
    for directory, warned in ((adapter, False), (other, True)):
        (directory / "qsun.json").write_text(json.dumps(made))  # which then says nothing of the weights
        answer = cli("check-pair", directory, tmp_path / "out")
        assert (answer.code, "calibrated with the KV of" in answer.err) == (0, warned)


# --- which served modules are covered


@pytest.mark.parametrize("order", [1, -1])
def test_a_served_module_that_calibration_leaves_out_is_warned_of(order, cli, talking_model, prefill, data, tmp_path):
    other = shutil.copytree(prefill, tmp_path / "other")
    served = [item for name in (prefill, other)[::order] for item in ("--served", name)]
    answer = quantized(cli, talking_model, tmp_path / "out", "--calib", data, "--calib-prefill", prefill, *served)
    (warning,) = (line for line in answer.err.splitlines() if line.startswith("warning: calibration does not cover"))
    assert f"served module {other}" in warning and f"--calib-prefill {other}" in warning


def test_without_prefill_modules_none_is_covered(cli, talking_model, prefill, data, tmp_path):
    answer = quantized(cli, talking_model, tmp_path / "out", "--calib", data, "--served", prefill, "--dry-run")
    assert f"warning: calibration does not cover served module {prefill}" in answer.err
    answer = quantized(cli, talking_model, tmp_path / "out", "--calib", data, "--dry-run")
    assert "cover" not in answer.err


def test_what_was_covered_is_remembered(cli, talking_model, prefill, data, tmp_path):
    quantized(cli, talking_model, tmp_path / "out", "--calib", data, "--calib-prefill", prefill)
    for module, warned in ((prefill, False), (talking_model, True)):
        answer = cli("check-pair", module, tmp_path / "out")
        assert (answer.code, answer.out) == (0, "OK\n")
        assert (f"calibrated with the KV of {prefill}, not of {module}" in answer.err) == warned


def test_a_served_module_must_fit(refused, tiny_model):
    refused("--served", tiny_model("qwen2"), says="does not fit decode module")


# --- refusals


def test_one_prefill_module_for_each_source(refused, prefill):
    refused("--calib-prefill", prefill, "--calib-prefill", prefill, says="1 calibration sources, but 2 prefill modules")


def test_text_has_no_prompts_to_read(refused, prefill, tmp_path):
    source = tmp_path / "text.txt"
    source.write_text("what the demo tokenizer reads " * 20)
    refused("--calib-prefill", prefill, says=f"{source} has no prompts for its prefill module", source=source)


def test_text_may_stand_beside_tasks_with_the_base_as_its_reader(cli, talking_model, prefill, data, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("what the demo tokenizer reads " * 20)
    options = ("--calib", text, "--calib-prefill", talking_model, "--calib", data, "--calib-prefill", prefill)
    quantized(cli, talking_model, tmp_path / "out", *options)


def test_an_adapter_as_peft_leaves_it(cli, refused, talking_model, data, tiny_model, tmp_path):
    """Without a qsun.json: its base is the one that adapter_config.json names."""
    adapter = written_adapter(talking_model, tmp_path / "adapter")
    quantized(cli, talking_model, tmp_path / "known", "--calib", data, "--calib-prefill", adapter)
    (adapter / "qsun.json").unlink()
    quantized(cli, talking_model, tmp_path / "plain", "--calib", data, "--calib-prefill", adapter)
    known, plain = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("known", "plain"))
    assert plain == known
    values = json.loads((adapter / "adapter_config.json").read_text())
    other = values | {"base_model_name_or_path": str(tiny_model("llama", initializer_range=0.1))}
    (adapter / "adapter_config.json").write_text(json.dumps(other))
    refused("--calib-prefill", adapter, says="base fingerprint is ")


def test_a_module_that_does_not_fit(refused, tiny_model):
    refused("--calib-prefill", tiny_model("llama", num_key_value_heads=4), says="num_key_value_heads is 4 ")


def test_a_module_that_is_quantized(refused, talking_model, tmp_path):
    module = tmp_path / "int4"
    qsun.quantize(talking_model, module, qsun.QuantConfig(method="rtn", group_size=32))
    refused("--calib-prefill", module, says="is quantized (gptq) and a prefill module is full precision")


def test_a_module_of_another_base(refused, prefill, tmp_path):
    module = shutil.copytree(prefill, tmp_path / "P")
    (module / "qsun.json").write_text(json.dumps({"kind": "prefill_module", "base_fingerprint": "0" * 64}))
    refused("--calib-prefill", module, says="base fingerprint is 0000000000000000 ")


def test_an_adapter_that_does_not_say_of_which_base(refused, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    refused("--calib-prefill", adapter, says="adapter_config.json names no base_model_name_or_path")


def test_an_adapter_whose_weights_are_not_there(refused, talking_model, tmp_path):
    adapter = written_adapter(talking_model, tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    refused("--calib-prefill", adapter, says="has adapter_config.json but no adapter_model.safetensors")


def test_an_adapter_with_nan(refused, talking_model, tmp_path):
    adapter = written_adapter(talking_model, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    refused("--json", "--calib-prefill", adapter, says=f"prefill module {adapter}: base_model.model.model.layers.0.")


def test_a_module_that_is_not_there(refused, tmp_path):
    refused("--calib-prefill", tmp_path / "nothing", says="nothing is not a directory")


def test_a_module_with_a_tensor_missing(refused, prefill, tmp_path):
    module = shutil.copytree(prefill, tmp_path / "P")
    tensors = load_file(module / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, module / "model.safetensors", {"format": "pt"})
    refused("--calib-prefill", module, says=f"{module} has no tensor model.layers.1.self_attn.k_proj.weight")


def test_a_module_with_nan(refused, prefill, tmp_path):
    module = shutil.copytree(prefill, tmp_path / "P")
    tensors = load_file(module / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 5] = torch.nan
    save_file(tensors, module / "model.safetensors", {"format": "pt"})
    says = f"prefill module {module}: model.layers.1.self_attn.k_proj.weight has NaN or Inf; the model is damaged"
    refused("--json", "--calib-prefill", module, says=says)


def test_rtn_says_that_it_reads_no_calibration(cli, talking_model, prefill, data, tmp_path):
    options = ("--calib", data, "--calib-prefill", prefill, "--method", "rtn")
    answer = quantized(cli, talking_model, tmp_path / "out", *options)
    assert "warning: rtn uses no calibration, so --calib-prefill has no effect" in answer.err
    assert json.loads((tmp_path / "out/qsun.json").read_text())["prefill_modules"] == []
