"""A killed run continues where it stopped and writes the same bytes; with other settings it is refused."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qsun
from qsun.model import output_dir as workdir
from qsun.model.checkpoint import read_header
from tests.tiny_models import SEQUENCE, prompt_rows, random_tokens, write_jsonl
from tests.warm_process import WarmProcess

BLOCK_LAYERS = 7
STEPS = 2 + 2 * BLOCK_LAYERS  # fingerprint, every layer of two blocks, read back


def slow_run(model, out, calibration, method):
    """Quantize so slowly that a kill falls into the block after the first."""
    torch.set_num_threads(1)
    config = qsun.QuantConfig(method=method, group_size=32, samples=6, seq_len=24)
    qsun.quantize(model, out, config, calibration, device="cpu", progress=lambda *_: time.sleep(0.4))


@pytest.fixture
def calibration(request, tmp_path) -> Path:
    """Prompt and response, which is the harder kind; tokens that all count where a test asks for them."""
    if getattr(request, "param", "prompts") == "prompts":
        return write_jsonl(tmp_path / "pairs.jsonl", prompt_rows(12))
    np.save(tmp_path / "tokens.npy", random_tokens(12, SEQUENCE))
    return tmp_path / "tokens.npy"


def settings(method: str, **changes: Any) -> qsun.QuantConfig:
    return qsun.QuantConfig(**({"method": method, "group_size": 32, "samples": 6, "seq_len": SEQUENCE} | changes))


def interrupt_at(step: int) -> Callable[..., None]:
    """A progress callback that stops the run as Ctrl-C would."""

    def progress(_label: str, done: int, _total: int) -> None:
        if done >= step:
            raise KeyboardInterrupt

    return progress


def noted(labels: list[str]) -> Callable[..., None]:
    """A progress callback that keeps the labels."""
    return lambda label, *_: labels.append(label)


def published(out: Path) -> dict[str, bytes]:
    """All files but the report, which holds times."""
    assert not out.with_name(out.name + ".partial").exists()
    files = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "report.json"}
    assert files.keys() >= {"model.safetensors", "config.json", "qsun.json"}
    return files


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("calibration", ["text", "prompts"], indirect=True)
@pytest.mark.parametrize("method", ["gptq", "awq", "awq+gptq", "refined"])
def test_the_same_seed_gives_the_same_bytes(method, calibration, talking_model, tmp_path):
    for name in ("first", "second"):
        qsun.quantize(talking_model, tmp_path / name, settings(method), calibration)
    assert published(tmp_path / "first") == published(tmp_path / "second")


def test_another_seed_draws_other_samples_and_gives_other_bytes(calibration, talking_model, tmp_path):
    for seed in (0, 1):
        qsun.quantize(talking_model, tmp_path / f"{seed}", settings("gptq", seed=seed), calibration)
    first, second = (published(tmp_path / f"{seed}")["model.safetensors"] for seed in (0, 1))
    assert first != second


@pytest.mark.parametrize(
    ("method", "calibration"),
    [("rtn", "text"), ("gptq", "text"), ("awq", "prompts"), ("refined", "prompts")],
    indirect=["calibration"],
)
def test_stopped_anywhere_and_resumed_gives_the_same_bytes(method, calibration, talking_model, tmp_path):
    config = settings(method)
    qsun.quantize(talking_model, tmp_path / "straight", config, calibration)
    expected = published(tmp_path / "straight")
    # after the fingerprint; inside block 0; at its end; inside block 1; before the module appears
    for step in (1, 4, 1 + BLOCK_LAYERS, 3 + BLOCK_LAYERS, STEPS):
        out = tmp_path / f"stopped{step}"
        with pytest.raises(KeyboardInterrupt):
            qsun.quantize(talking_model, out, config, calibration, progress=interrupt_at(step))
        assert not out.exists()
        assert (tmp_path / f"{out.name}.partial/parts/block-00000.json").exists() == (step > 1 + BLOCK_LAYERS)
        labels: list[str] = []
        qsun.quantize(talking_model, out, config, calibration, resume=True, progress=noted(labels))
        assert ("block-00000 (kept)" in labels) == (step > 1 + BLOCK_LAYERS)
        assert published(out) == expected, f"stopped at step {step}"


def test_stopped_again_and_again(calibration, talking_model, tmp_path):
    config = settings("refined", lm_head=True, overrides=("layers.0.mlp.(gate|up)_proj=skip",))
    qsun.quantize(talking_model, tmp_path / "straight", config, calibration)
    for step in (2, 7, 7, 11, 14):
        with pytest.raises(KeyboardInterrupt):
            qsun.quantize(
                talking_model, tmp_path / "out", config, calibration, resume=True, progress=interrupt_at(step)
            )
    qsun.quantize(talking_model, tmp_path / "out", config, calibration, resume=True)
    assert published(tmp_path / "out") == published(tmp_path / "straight")


def test_a_part_without_its_record_is_made_again(calibration, talking_model, tmp_path, monkeypatch):
    """Tensors first, record last: a part that was cut off between the two, or inside, does not count."""
    config, out = settings("gptq"), tmp_path / "out"
    write = workdir.write_json

    def cut_off(path: Path, value: Any) -> None:
        if path.name == "block-00001.json":
            raise KeyboardInterrupt
        write(path, value)

    monkeypatch.setattr(workdir, "write_json", cut_off)
    with pytest.raises(KeyboardInterrupt):
        qsun.quantize(talking_model, out, config, calibration)
    monkeypatch.setattr(workdir, "write_json", write)
    partial = tmp_path / "out.partial"
    (partial / "parts" / "rest.draft").write_bytes(b"half a draft")
    (partial / "module" / "config.json").write_text("of the interrupted run")
    entries, start = read_header(partial / "module" / "model.safetensors")
    with open(partial / "module" / "model.safetensors", "r+b") as file:
        file.seek(start + entries["model.layers.1.mlp.up_proj.qweight"]["data_offsets"][0])
        file.write(b"half a part")
    qsun.quantize(talking_model, out, config, calibration, resume=True)
    qsun.quantize(talking_model, tmp_path / "straight", config, calibration)
    assert published(out) == published(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize(("method", "kind"), [("gptq", "text"), ("refined", "prompts")])
def test_killed_after_the_first_block_and_resumed(method, kind, cli, talking_model, tmp_path):
    source = tmp_path / "calibration.jsonl"
    write_jsonl(source, prompt_rows(12) if kind == "prompts" else [{"text": "what the demo tokenizer reads " * 20}])
    part = tmp_path / "out.partial" / "parts" / "block-00000.json"
    deadline = time.monotonic() + 120
    with WarmProcess(slow_run, talking_model, tmp_path / "out", source, method) as process:
        while not part.exists():
            assert process.poll() is None and time.monotonic() < deadline, "no part appeared"
            time.sleep(0.01)
        time.sleep(0.6)  # into the next block
    assert not (tmp_path / "out").exists() and part.exists()
    assert not part.with_name("block-00001.json").exists(), "the run was not slow enough for this test"

    options = ["--method", method, "--group-size", 32, "--samples", 6, "--seq-len", SEQUENCE, "--calib", source]
    refused = cli("quantize", talking_model, "-o", tmp_path / "out", *options)
    assert refused.code == 2 and "out.partial holds an interrupted run; continue it with --resume" in refused.err
    assert cli("quantize", talking_model, "-o", tmp_path / "out", *options, "--resume").code == 0
    assert cli("quantize", talking_model, "-o", tmp_path / "straight", *options).code == 0
    assert published(tmp_path / "out") == published(tmp_path / "straight")


# --- what a resumed run may not change


@pytest.fixture
def interrupted(talking_model, tmp_path) -> list[Any]:
    """An interrupted run; returns the command line that continues it."""
    np.save(tmp_path / "tokens.npy", random_tokens(12, SEQUENCE))
    with pytest.raises(KeyboardInterrupt):
        qsun.quantize(
            talking_model, tmp_path / "out", settings("gptq"), tmp_path / "tokens.npy", progress=interrupt_at(10)
        )
    options = ["--method", "gptq", "--group-size", 32, "--samples", 6, "--seq-len", SEQUENCE]
    return ["quantize", talking_model, "-o", tmp_path / "out", *options, "--calib", tmp_path / "tokens.npy", "--json"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (("--bits", "8"), "bits was 4 and is now 8"),
        (("--asym",), "sym was True and is now False"),
        (("--method", "refined"), "method was 'gptq' and is now 'refined'"),
        (("--override", "down_proj=bits:8"), "overrides was [] and is now ['down_proj=bits:8']"),
        (("--format", "compressed-tensors"), "format was 'gptq' and is now 'compressed-tensors'"),
        (("--samples", "5"), "samples was 6 and is now 5"),
        (("--dtype", "bfloat16"), "dtype was 'auto' and is now 'bfloat16'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_changed_setting_is_refused_by_name(changes, says, interrupted, cli, tmp_path):
    before = tree(tmp_path / "out.partial")
    answer = cli(*interrupted, "--resume", *changes)
    assert answer.code == 2 and answer.out == "" and answer.err.startswith("error: cannot resume")
    assert says in answer.err and len(answer.err.splitlines()) == 1
    assert tree(tmp_path / "out.partial") == before, "a refusal must not touch the interrupted run"


def test_other_calibration_data_is_refused(interrupted, cli, tmp_path):
    np.save(tmp_path / "tokens.npy", random_tokens(12, SEQUENCE, seed=1))
    answer = cli(*interrupted, "--resume")
    assert answer.code == 2 and "cannot resume" in answer.err and "calibration was" in answer.err


def test_another_base_is_refused(interrupted, cli, tiny_model, tmp_path):
    import torch

    interrupted[1] = tiny_model("llama", torch.bfloat16, initializer_range=0.1)
    answer = cli(*interrupted, "--resume")
    assert answer.code == 2 and "cannot resume" in answer.err and "base was" in answer.err


def test_after_a_refusal_the_right_settings_still_go_on(interrupted, cli, tmp_path):
    assert cli(*interrupted, "--resume", "--bits", 8).code == 2
    assert cli(*interrupted).code == 2, "without --resume an interrupted run is not touched"
    assert cli(*interrupted, "--resume").code == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_resume_without_an_interrupted_run_is_a_new_run(talking_model, cli, tmp_path):
    options = ("--method", "rtn", "--group-size", 32)
    assert cli("quantize", talking_model, "-o", tmp_path / "out", *options, "--resume").code == 0
    assert cli("quantize", talking_model, "-o", tmp_path / "out", *options, "--resume").code == 2, "OUT exists"


def test_ctrl_c_says_how_to_go_on(talking_model, cli, tmp_path, monkeypatch):
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qsun.quantization.run.run_job", interrupted)
    answer = cli("quantize", talking_model, "-o", tmp_path / "out", "--method", "rtn", "--group-size", 32)
    assert (answer.code, answer.out) == (130, "")
    assert answer.err == "error: interrupted; finished blocks are kept, --resume continues\n"
