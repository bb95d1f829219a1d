"""`qsun tune`: what it prints, and what a user can get wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import qsun
from tests.quantization.test_bad_input import assert_one_error
from tests.tiny_models import prompt_rows, write_jsonl


@pytest.fixture
def rows(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", prompt_rows(40))


FAST = ("--steps", 2, "--batch-size", 4, "--device", "cpu")


def test_a_run(cli, talking_model, rows, tmp_path):
    answer = cli("tune", talking_model, "-o", tmp_path / "out", "--data", rows, *FAST)
    assert answer.code == 0, answer.err
    assert "prefill module, validation loss" in answer.out
    assert "2/2" in answer.err
    assert json.loads((tmp_path / "out" / "report.json").read_text())["best_step"] in (0, 1, 2)
    assert cli("check-pair", tmp_path / "out", talking_model).code == 0
    told = cli("inspect", tmp_path / "out")
    assert told.code == 0
    assert "prefill module" in told.out


def test_json_is_all_there_is_on_stdout(cli, talking_model, rows, tmp_path):
    answer = cli("tune", talking_model, "-o", tmp_path / "out", "--data", rows, *FAST, "--json")
    assert answer.code == 0, answer.err
    report = json.loads(answer.out)
    assert [step for step, _ in report["train_loss"]] == [1, 2]
    assert answer.err == ""


def test_a_part_of_the_validation_data(cli, rows, tmp_path):
    counts = []
    for count in (3, 0):
        answer = cli(
            "tune", "demo", "-o", tmp_path / "o", "--data", rows, "--eval-data", rows, "--valid-examples", count,
            "--dry-run", "--json",
        )  # fmt: skip
        counts.append(json.loads(answer.out)["validation_examples"])
    assert counts == [3, 40]


def test_a_dry_run_writes_nothing(cli, rows, tmp_path):
    answer = cli("tune", "demo", "-o", tmp_path / "out", "--data", rows, "--epochs", 2, "--dry-run", "--json")
    plan = json.loads(answer.out)
    assert plan["training_examples"] + plan["validation_examples"] == 40
    assert plan["steps"] == 2 * -(-plan["training_examples"] // 16)
    assert plan["weights"] == 803_968  # tied embeddings count once
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_configuration_file_and_options_that_win(cli, rows, tmp_path):
    (tmp_path / "tune.yaml").write_text("steps: 7\nlr: 0.01\n")
    answer = cli(
        "tune", "demo", "-o", tmp_path / "o", "--data", rows, "--config", tmp_path / "tune.yaml", "--steps", 3,
        "--dry-run", "--json",
    )  # fmt: skip
    plan = json.loads(answer.out)
    assert (plan["steps"], plan["peak_lr"]) == (3, 0.01)


@pytest.fixture
def refused(cli, tmp_path, rows):
    def run(decode, *options, says, data=None):
        answer = cli("tune", decode, "-o", tmp_path / "out", "--data", data or rows, *FAST, *options)
        assert_one_error(answer.code, answer.out, answer.err, says)
        assert not list(tmp_path.glob("out*"))

    return run


def test_a_missing_decode_module(refused, tmp_path):
    refused(tmp_path / "nothing", says="nothing is not a directory")


def test_missing_data(refused, tmp_path):
    refused("demo", data=tmp_path / "none.jsonl", says="training file")


def test_a_line_that_is_no_json(refused, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": \n')
    refused("demo", data=tmp_path / "bad.jsonl", says="bad.jsonl, line 2: not valid JSON")


def test_bytes_that_are_no_text(refused, tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b'{"prompt": "\xff", "response": "b"}\n')
    refused("demo", data=tmp_path / "bad.jsonl", says="line 1: not valid UTF-8")


def test_an_empty_file(refused, tmp_path):
    (tmp_path / "bad.jsonl").write_text("\n")
    refused("demo", data=tmp_path / "bad.jsonl", says="has no examples")


def test_validation_data_is_named_as_such(refused, tmp_path):
    refused("demo", "--eval-data", tmp_path / "none.jsonl", says="validation file")


def test_a_model_without_tokenizer(refused, tiny_model):
    refused(tiny_model("llama"), says="has no tokenizer, and training data is text")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--lr", -1), "lr -1.0 is out of range"),
        (("--batch-size", 0), "batch_size 0 is out of range"),
        (("--baseline", "half"), "baseline 'half' is not supported; use none or full"),
        (("--dtype", "int8"), "dtype 'int8' is not supported"),
        (("--device", "tpu:0"), "device 'tpu:0'"),
        (("--base", "nowhere"), "give the base with --base"),
        (("--init", "nowhere"), "nowhere is not a directory"),
        (("--init", "demo", "--lora-rank", 4), "leave one out"),
    ],
)
def test_options_that_do_not_fit(options, says, refused):
    refused("demo", *options, says=says)


def test_an_unknown_setting(refused, tmp_path):
    (tmp_path / "tune.yaml").write_text("learning_rate: 1\n")
    refused("demo", "--config", tmp_path / "tune.yaml", says="unknown setting 'learning_rate'")


def test_an_output_that_exists(cli, rows, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    answer = cli("tune", "demo", "-o", tmp_path / "out", "--data", rows, *FAST)
    assert_one_error(answer.code, answer.out, answer.err, "out exists; choose another")
    assert (tmp_path / "out" / "file").read_text() == "mine"


def test_a_base_of_another_shape(refused, tiny_model):
    refused("demo", "--base", tiny_model("llama"), says="base does not fit decode module demo: ")


@pytest.fixture
def quantized(talking_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("q") / "decode"
    qsun.quantize(talking_model, out, qsun.QuantConfig(method="rtn", group_size=32))
    return out


def test_a_quantized_base(refused, quantized, talking_model):
    refused(talking_model, "--base", quantized, says="is quantized")


def test_a_base_that_is_gone(refused, quantized):
    made = json.loads((quantized / "qsun.json").read_text())
    (quantized / "qsun.json").write_text(json.dumps(made | {"base": "/nowhere/base"}))
    refused(quantized, says="was quantized from /nowhere/base, which was not found; give the base with --base")
    (quantized / "qsun.json").unlink()
    refused(quantized, says="is quantized and does not say from which base")


def test_another_base_of_the_same_shape(refused, quantized, talking_model, tmp_path):
    made = json.loads((quantized / "qsun.json").read_text())
    (quantized / "qsun.json").write_text(json.dumps(made | {"base_fingerprint": "0" * 64}))
    refused(quantized, says="is not the base that")


def test_tokens_outside_the_vocabulary(refused, talking_model, tmp_path):
    """The tokenizer has more tokens than the model has embeddings."""
    from qsun.model.locate import load_tokenizer

    model = tmp_path / "model"
    shutil.copytree(talking_model, model)
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(model)
    rows = [{"prompt": f"say <tool> {n}", "response": f"{n}"} for n in range(30)]
    says = "training data has token 128 ('<tool>'), outside the model's vocabulary of 128"
    refused(model, data=write_jsonl(tmp_path / "tools.jsonl", rows), says=says)


@pytest.fixture
def copied(talking_model, tmp_path):
    return shutil.copytree(talking_model, tmp_path / "copy")


def quantized_by(directory, **stored):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    return directory


OTHERS = [
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "compressed-tensors"),
]


@pytest.mark.parametrize(("stored", "name"), [*OTHERS, ({"quant_method": "gptq", "bits": 4}, "gptq")])
def test_a_base_that_others_quantized(stored, name, refused, copied, talking_model):
    quantized_by(copied, **stored)
    refused(talking_model, "--base", copied, says=f"is quantized already ({name}")


@pytest.mark.parametrize(("stored", "name"), OTHERS)
def test_a_decode_module_that_cannot_be_read(stored, name, refused, copied):
    says = f"quantization {name!r}"
    refused(quantized_by(copied, **stored), says=says)


def stored_as(directory, dtype):
    """The weights of the blocks in another dtype, without a quantization_config."""
    tensors = load_file(directory / "model.safetensors")
    inside = {name: t.to(dtype) if name.endswith("proj.weight") else t for name, t in tensors.items()}
    save_file(inside, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize(("dtype", "name"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")])
def test_weights_in_a_dtype_of_few_bits(dtype, name, refused, copied, talking_model):
    stored_as(copied, dtype)
    for options in ((copied,), (talking_model, "--base", copied), (talking_model, "--init", copied)):
        refused(*options, says=f"is stored as {name}, so the model is quantized already")


def test_an_output_inside_what_is_read(cli, rows, copied):
    answer = cli("tune", copied, "-o", copied / "tuned", "--data", rows, *FAST)
    assert_one_error(answer.code, answer.out, answer.err, "is inside the input")
    assert not (copied / "tuned.partial").exists()


def test_no_memory_while_it_runs(cli, rows, talking_model, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("qsun.tuning.tuner.Tuner.train_step", fail)
    answer = cli("tune", talking_model, "-o", tmp_path / "out", "--data", rows, *FAST)
    assert answer.code == 2
    error = answer.err.splitlines()[-1]
    assert "memory ran out; use a machine with more, or more --grad-accum" in error and "--samples" not in error
