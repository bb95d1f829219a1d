"""Users' mistakes: one line on stderr that names the mistake, exit code 2, and no files left behind."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import qsun
from qsun.errors import QsunError
from qsun.memory import clear_out_of_memory
from qsun.model.output_dir import ShardWriter
from qsun.quantization.job import prepare
from qsun.quantization.run import run_job
from tests.tiny_models import SEQUENCE, random_tokens

FAST = ("--method", "rtn", "--bits", "4", "--group-size", "32")
ADVICE = "calibrated without the prefill modules"
CALIBRATED = ("--method", "gptq", "--group-size", "32", "--seq-len", SEQUENCE, "--samples", 8)


@pytest.fixture
def base(tiny_model, tmp_path) -> Path:
    """A copy of a tiny model, to be damaged."""
    return Path(shutil.copytree(tiny_model("llama", torch.bfloat16), tmp_path / "base"))


@pytest.fixture
def refused(cli, tmp_path):
    """Run `qsun quantize MODEL -o OUT ...`, check that it fails as above, and return the line."""

    def run(model, *options, says: str, leaves: tuple[str, ...] = ()) -> str:
        answer = cli("quantize", model, "-o", tmp_path / "out", *options)
        assert_one_error(answer.code, answer.out, answer.err, says)
        assert sorted(path.name for path in tmp_path.glob("out*")) == sorted(leaves)
        return answer.err

    return run


def assert_one_error(code: int, out: str, err: str, says: str) -> None:
    lines = err.splitlines()
    assert code == 2, err
    assert out == ""
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    assert says in lines[0]


def edit_config(base: Path, **changes) -> None:
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(values | changes))


def edit_tensors(base: Path, change) -> None:
    """`change` gets the tensors by name and edits them in place."""
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def shard(base: Path) -> dict[str, str]:
    """Cut a model in two files with an index. Returns the index."""
    tensors = load_file(base / "model.safetensors")
    names = sorted(tensors)
    weight_map = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == file}, base / file, {"format": "pt"})
    (base / "model.safetensors").unlink()
    write_index(base, weight_map)
    return weight_map


def write_index(base: Path, weight_map: dict[str, str]) -> None:
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# --- the model directory


def test_a_missing_directory(refused, tmp_path):
    refused(tmp_path / "nothing", *FAST, says="nothing is not a directory")


def test_an_empty_directory(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", *FAST, says="has no model.safetensors")


def test_a_truncated_file(refused, base):
    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[:-100])
    refused(base, *FAST, says=f"model.safetensors is damaged: {len(whole) - 100} bytes where its header says")


def test_a_truncated_shard(refused, base):
    file = base / shard(base)["model.norm.weight"]
    file.write_bytes(file.read_bytes()[:-1])
    refused(base, *FAST, says=f"{file.name} is damaged")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"\xff" * 8 + data[8:],  # an endless header
        lambda data: data[:8] + b"#" + data[9:],  # not JSON
        lambda data: data[:8] + data[8:].replace(b'"shape"', b'"shapf"', 1),
        lambda data: data[:8] + data[8:].replace(b'"dtype"', b'"dtypf"', 1),
        lambda data: data[:8] + data[8:].replace(b'"BF16"', b'"BF99"', 1),
        lambda data: data[:5],
        lambda data: b"",
    ],
    ids=["length", "json", "shape", "dtype key", "dtype", "five bytes", "empty"],
)
def test_a_corrupted_header(damage, refused, base):
    file = base / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    refused(base, *FAST, says="model.safetensors")


def test_an_index_that_names_a_tensor_no_file_has(refused, base):
    weight_map = shard(base)
    write_index(base, weight_map | {"model.layers.0.ghost.weight": weight_map["model.norm.weight"]})
    refused(base, *FAST, says="the index says model.layers.0.ghost.weight is in")


def test_an_index_that_names_a_missing_file(refused, base):
    name = shard(base)["model.norm.weight"]
    (base / name).unlink()
    refused(base, *FAST, says=f"the index names {name}, which is not there")


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {}}', '{"weight_map": 5}', "{}"])
def test_an_index_that_is_none(content, refused, base):
    shard(base)
    (base / "model.safetensors.index.json").write_text(content)
    refused(base, *FAST, says=str(base))


def test_pickled_weights_are_not_read(refused, base):
    tensors = load_file(base / "model.safetensors")
    torch.save(tensors, base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    refused(base, *FAST, says="has only pickled weights, which can run code")


def test_an_unknown_architecture(refused, base):
    edit_config(base, model_type="rwkv")
    refused(base, *FAST, says="architecture 'rwkv' is not supported; known are llama")


def test_a_mixture_of_experts(refused, base):
    edit_config(base, model_type="mixtral")
    refused(base, *FAST, says="architecture 'mixtral' is a mixture of experts")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": None}, "names no model_type"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"intermediate_size": 256}, "config.json says [256, 64]"),
        ({"num_hidden_layers": 3}, "has no tensor model.layers.2."),
        ({"num_hidden_layers": 1}, "model.layers.1."),
        ({"vocab_size": 200}, "model.embed_tokens.weight is [128, 64], but config.json says [200, 64]"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_config_that_is_not_that_of_the_weights(changes, says, refused, base):
    edit_config(base, **changes)
    refused(base, *FAST, says=says)


def test_a_config_that_is_not_json(refused, base):
    (base / "config.json").write_text("{")
    refused(base, *FAST, says="config.json cannot be read as JSON")


def test_no_config(refused, base):
    (base / "config.json").unlink()
    refused(base, *FAST, says="config.json")


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.mlp.up_proj.weight",
    ],
)
@pytest.mark.parametrize("damage", ["gone", "another shape"])
def test_tensors_that_do_not_fit_are_found_before_work_starts(name, damage, refused, base):
    def change(tensors):
        tensor = tensors.pop(name)
        if damage == "another shape":
            tensors[name] = tensor[:-32].clone()

    edit_tensors(base, change)
    refused(base, *FAST, says=name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
def test_weights_that_are_no_numbers_are_named(name, method, value, refused, base, token_file):
    def change(tensors):
        tensors[name].view(-1)[3] = value

    edit_tensors(base, change)
    options = FAST if method == "rtn" else (*CALIBRATED, "--calib", token_file)
    refused(base, *options, "--json", says=f"{name} has NaN or Inf")


def to_float8(tensors) -> None:
    for name in tensors:
        if "proj" in name:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "is quantized already (fp8)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "is quantized already (bitsandbytes)"),
        ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "(compressed-tensors int-quantized)"),
        ({}, "is stored as F8_E4M3, so the model is quantized already"),
        (None, "mlp.down_proj.weight is stored as F8_E4M3, so the model is quantized already"),
    ],
)
def test_a_model_that_others_quantized(stored, says, refused, base):
    edit_tensors(base, to_float8)
    if stored is not None:
        edit_config(base, quantization_config=stored)
    refused(base, *FAST, says=says)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_file_that_no_loader_could_read_is_not_copied(name, refused, base):
    (base / name).write_text("")
    refused(base, *FAST, says=f"{name} cannot be read as JSON")


def test_an_output_inside_the_input(cli, base):
    before = sorted(base.rglob("*"))
    answer = cli("quantize", base, "-o", base / "int4", *FAST)
    assert_one_error(answer.code, answer.out, answer.err, f"{base / 'int4'} is inside the input {base}")
    assert sorted(base.rglob("*")) == before


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] can't allocate memory: you tried to allocate 8192 bytes.")]
)
@pytest.mark.parametrize("place", ["qsun.quantization.job.Skeleton", "qsun.quantization.run._quantize"])
def test_no_memory(place, error, cli, base, tmp_path, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(place, fail)
    answer = cli("quantize", base, "-o", tmp_path / "out", *FAST)
    assert_one_error(answer.code, answer.out, answer.err, "memory ran out")
    assert ("8192 bytes more" in answer.err) == isinstance(error, RuntimeError)


@pytest.mark.parametrize(("error", "needed"), [(torch.OutOfMemoryError, "7 GB"), (MemoryError, "1 GB")])
def test_no_memory_beside_a_gpu_says_what_the_one_that_ran_out_has_to_hold(error, needed, base, tmp_path, monkeypatch):
    job = prepare(base, tmp_path / "out", qsun.QuantConfig(method="rtn", group_size=32), device="cpu")
    job = replace(job, plan=replace(job.plan, peak_ram_bytes=1_000_000_000, peak_vram_bytes=7_000_000_000))

    def fail(*_):
        raise error("out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("qsun.quantization.run._quantize", fail)
    with pytest.raises(QsunError, match=f"memory ran out asking for 2.00 GiB more, about {needed} are needed in all"):
        run_job(job)


def test_other_runtime_errors_are_not_about_memory():
    with pytest.raises(RuntimeError, match="a bug"), clear_out_of_memory():
        raise RuntimeError("a bug")


@pytest.mark.parametrize("fmt", ["gptq", "awq", "compressed-tensors"])
def test_a_model_that_is_quantized_already(fmt, cli, refused, base, tmp_path):
    grid = ("--asym",) if fmt == "awq" else ()
    assert cli("quantize", base, "-o", tmp_path / "int4", *FAST, *grid, "--format", fmt).code == 0
    refused(tmp_path / "int4", *FAST, says="; give the full-precision base")


# --- settings


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--bits", "5"), "bits 5 is not supported; use 2, 3, 4 or 8"),
        (("--group-size", "48"), "group_size 48 is not supported; use -1, 32, 64 or 128"),
        (("--group-size", "128"), "group_size 128 does not divide in_features 64 of model.layers.0.self_attn.q_proj"),
        (("--method", "magic"), "method 'magic' is not supported"),
        (("--format", "gguf"), "format 'gguf' is not supported"),
        (("--samples", "0"), "samples 0 is out of range"),
        (("--seq-len", "1"), "seq_len 1 is out of range"),
        (("--seed", "-1"), "seed -1 is out of range"),
        (("--dtype", "int8"), "dtype 'int8' is not supported"),
        (("--format", "awq", "--asym", "--bits", "3"), "awq"),
        (("--format", "awq", "--asym", "--desc-act", "--method", "gptq"), "desc_act"),
        (("--format", "compressed-tensors", "--desc-act", "--method", "gptq"), "desc_act"),
        (("--desc-act",), "desc_act"),  # rtn has no order: the flag would only be written down
        (("--method", "awq", "--desc-act"), "desc_act"),
        (("--device", "abacus"), "device 'abacus' is not known"),
        (("--device", "meta"), "device 'meta'"),
        (("--device", "cuda:99"), "device 'cuda:99'"),
        (("--override", "no_such_layer=bits:8"), "override pattern 'no_such_layer' matches no layer"),
        (("--override", "q_proj=bits:8"), "q_proj, k_proj, v_proj"),
        (("--override", "gate_proj=skip"), "gate_proj, up_proj"),
        (("--override", "([=bits:8"), "override pattern '([' is not a regular expression"),
        (("--override", "q_proj"), "override 'q_proj' is not of the form"),
        (("--override", "q_proj=bits:five"), "override 'q_proj=bits:five': bits 'five' is not supported"),
        (("--override", "q_proj=bits:5"), "override 'q_proj=bits:5': bits 5 is not supported"),
        (("--override", "q_proj=colour:5"), "'colour'"),
        (
            ("--override", "down_proj=group_size:128", "--override", "o_proj=group_size:128"),
            "does not divide in_features 64",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_impossible_settings(options, says, refused, base):
    refused(base, *FAST, *options, says=says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("colour: red\n", "unknown setting 'colour'; known are: bits"),
        ("bits: [4\n", "config.yaml is not YAML"),
        ("bits: 5\n", "bits 5 is not supported"),
        ("bits: four\n", "bits 'four' is not supported"),
        ("bits:\n", "bits None"),
        ("sym: 1\n", "sym 1 is neither true nor false"),
        ("samples: 1.5\n", "samples 1.5"),
        ("damp_percent: .nan\n", "damp_percent nan"),
        ("- bits\n", "is not a mapping of settings"),
        ("", "is not a mapping of settings"),
        ("5: bits\nbits: 4\ncolour: red\n", "unknown setting"),
        ("overrides: 5\n", "overrides"),
        ("overrides: down_proj=bits:8\n", "overrides"),
        ("overrides: [5]\n", "override"),
        ("overrides: [{pattern: down_proj, bits: 8}]\n", "override"),
    ],
)
def test_a_bad_config_file(content, says, refused, base, tmp_path):
    (tmp_path / "config.yaml").write_text(content)
    refused(base, "--config", tmp_path / "config.yaml", says=says)


@pytest.mark.parametrize("name", ["nothing.yaml", "."])
def test_no_config_file(name, refused, base, tmp_path):
    refused(base, "--config", tmp_path / name, says="config file")


# --- calibration


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("c.txt", b"", "c.txt is empty"),
        ("c.txt", b"short", "c.txt is too short: 6 tokens"),
        ("c.txt", b"one\ntw\xffo", "c.txt, line 2: not valid UTF-8"),
        ("c.jsonl", b"", "c.jsonl is empty"),
        ("c.jsonl", b'{"text": "a"}\n{"text"\n', "c.jsonl, line 2: not valid JSON"),
        ("c.jsonl", b'{"text": "\xff"}\n', "c.jsonl, line 1: not valid UTF-8"),
        ("c.npy", b"", "c.npy is not a valid .npy file"),
        ("c.parquet.gz", None, "c.parquet.gz"),
    ],
)
def test_bad_calibration(name, content, says, refused, talking_model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(talking_model, *CALIBRATED, "--calib", tmp_path / name, says=says)


def test_a_calibration_token_outside_the_vocabulary(refused, base, tmp_path):
    np.save(tmp_path / "c.npy", random_tokens(2, SEQUENCE) + 100)
    refused(base, *CALIBRATED, "--calib", tmp_path / "c.npy", says="outside the model's vocabulary of 128")


def test_a_model_without_a_tokenizer_needs_token_ids(refused, base):
    refused(base, *CALIBRATED, says="give .npy token ids")


# --- the output directory


def test_an_output_that_exists(refused, base, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("kept")
    refused(base, *FAST, says="out exists; choose another", leaves=("out",))
    assert (tmp_path / "out" / "precious").read_text() == "kept"


def test_an_output_that_is_a_file(refused, base, tmp_path):
    (tmp_path / "out").write_text("kept")
    refused(base, *FAST, says="out exists", leaves=("out",))
    assert (tmp_path / "out").read_text() == "kept"


def test_an_output_below_a_file(cli, base, tmp_path):
    (tmp_path / "file").write_text("kept")
    answer = cli("quantize", base, "-o", tmp_path / "file" / "out", *FAST)
    assert_one_error(answer.code, answer.out, answer.err, "file")


def test_too_little_space_is_seen_before_work_starts(refused, base, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    refused(base, *FAST, says="has 1 kB free, but the run needs")


def test_what_is_written_needs_no_more_space(base, tmp_path, monkeypatch):
    """An interrupted run continues on a disk that has room for the rest of its output."""
    module = tmp_path / "out.partial" / "module"
    module.mkdir(parents=True)
    config = qsun.QuantConfig(method="rtn", group_size=32)
    needed = prepare(base, tmp_path / "fresh", config).plan.output_bytes
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, needed - 8192))
    with open(module / "model.safetensors", "wb") as file:
        file.truncate(needed)  # a hole, as the file of a run that has finished nothing
    with pytest.raises(qsun.QsunError, match="free, but the run needs"):
        prepare(base, tmp_path / "out", config, resume=True)
    with open(module / "model.safetensors", "r+b") as file:
        file.write(b"x" * 8192)
        os.fsync(file.fileno())
    prepare(base, tmp_path / "out", config, resume=True)
    with pytest.raises(qsun.QsunError, match="free, but the run needs"):
        prepare(base, tmp_path / "fresh", config)


def test_space_that_runs_out_midway_keeps_what_is_finished(refused, cli, base, tmp_path, monkeypatch):
    write = ShardWriter.write

    def full_disk(writer, tensors):
        if any(name.startswith("model.layers.1.") for name in tensors):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(writer, tensors)

    monkeypatch.setattr(ShardWriter, "write", full_disk)
    err = refused(base, *FAST, says="no space left on the disk", leaves=("out.partial",))
    assert "--resume" in err
    assert (tmp_path / "out.partial" / "parts" / "block-00000.json").exists()
    monkeypatch.setattr(ShardWriter, "write", write)
    assert cli("quantize", base, "-o", tmp_path / "out", *FAST, "--resume").code == 0
    assert cli("quantize", base, "-o", tmp_path / "straight", *FAST).code == 0
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "straight"))
    assert first == second
    assert not (tmp_path / "out.partial").exists()


# --- the process itself


@pytest.mark.slow
def test_a_real_process_says_one_line_and_nothing_else(base, tmp_path):
    """In this process pytest could swallow a warning that a user would see."""
    (base / "model.safetensors").write_bytes(b"")
    for model, options, says in ((base, (), "model.safetensors"), ("demo", ("--bits", "5"), "bits 5")):
        done = subprocess.run(
            [sys.executable, "-m", "qsun.cli.main", "quantize", model, "-o", tmp_path / "out", *options],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert_one_error(done.returncode, done.stdout, done.stderr, says)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_a_real_process_prints_one_json_object(tmp_path):
    out = tmp_path / "out"
    options = ["--method", "gptq", "--samples", "4", "--seq-len", "64", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "qsun.cli.main", "quantize", "demo", "-o", out, *options],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [line[: len("warning: " + ADVICE)] for line in done.stderr.splitlines()] == ["warning: " + ADVICE]
    assert_report(json.loads(done.stdout), out)


def test_json_is_one_object_on_stdout(cli, base, token_file, tmp_path):
    answer = cli("quantize", base, "-o", tmp_path / "out", *CALIBRATED, "--calib", token_file, "--json")
    assert answer.code == 0 and len(answer.err.splitlines()) == 1 and ADVICE in answer.err
    report = json.loads(answer.out)
    assert_report(report, tmp_path / "out")
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())


def assert_report(report: dict, out: Path) -> None:
    assert report["out"] == str(out)
    assert report["cpu_seconds"] > 0 and report["seconds"] > 0
    assert 10**8 < report["peak_rss_bytes"] < 10**11
    assert 4 < report["bits_per_weight"] < 6
    assert len(report["layers"]) % 7 == 0
    for layer in report["layers"]:
        assert layer.keys() >= {"name", "bits", "group_size", "error"}
        assert layer["name"].startswith("model.layers.") and layer["bits"] == 4
        assert 0 < layer["error"] < 0.2


def test_a_dry_run_writes_nothing(cli, base, token_file, tmp_path):
    options = (*CALIBRATED, "--calib", token_file, "--dry-run", "--json")
    answer = cli("quantize", base, "-o", tmp_path / "out", *options)
    assert answer.code == 0 and not list(tmp_path.glob("out*"))
    assert json.loads(answer.out)["calibration_tokens"] == 8 * SEQUENCE
