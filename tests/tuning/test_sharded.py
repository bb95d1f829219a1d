"""Tuning with weights that are shared out over two processes: it gives what one process gives, and each holds half."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

import qsun
from qsun.demo import base_directory
from qsun.model.checkpoint import Checkpoint
from qsun.model.output_dir import Workdir
from qsun.tuning.split_tensors import SplitTensors
from tests.tiny_models import write_jsonl
from tests.tuning.test_tuner import FAST, same_curve, sums
from tests.tuning.tune_in_parallel import first_gradients, held_bytes, in_two_processes


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Also prompts of one token, which one process may have in a piece while the other has none."""
    rows = sums(40) + [{"prompt": "", "response": "a"}] * 3
    return write_jsonl(tmp_path_factory.mktemp("data") / "few.jsonl", rows)


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    """Tied full precision; int4; int4 with a quantized head."""
    made = {"plain": "demo"}
    for name, head in (("int4", False), ("int4-head", True)):
        made[name] = tmp_path_factory.mktemp(name) / "decode"
        qsun.quantize("demo", made[name], qsun.QuantConfig(method="rtn", group_size=32, lm_head=head))
    return made


def gathered(files):
    """Rows of both processes, one after the other."""
    shares = [load_file(file) for file in files]
    names = dict.fromkeys(name for share in shares for name in share)
    return {name: torch.cat([share[name] for share in shares if name in share]) for name in names}


def distance(a, b):
    """Return the mean distance of each row, (N,) of a matrix."""
    return (a.float() - b.float()).abs().flatten(1).mean(1) if a.ndim > 1 else (a.float() - b.float()).abs().mean()


CASES = {
    "plain": {},
    "int4": {},
    "int4-head": {"grad_checkpoint": True, "grad_accum": 2},
    "plain-recomputed": {"grad_checkpoint": True},
    "plain-lora": {"lora_rank": 2},
    "int4-lora": {"lora_rank": 2, "grad_checkpoint": True},
    "plain-full": {"baseline": "full"},
    "plain-ordinary": {"baseline": "full", "lora_rank": 4},
    "plain-pieces": {"grad_accum": 9, "batch_size": 3},  # more pieces than examples: one process has none left
}


def decoder_of(case):
    return case if case in ("plain", "int4", "int4-head") else case.rpartition("-")[0]


@pytest.fixture(scope="module")
def tuned_by_two(decoders, few, tmp_path_factory):
    """A folder for each case, with all of them tuned by one launch: starting processes takes most of the time."""
    root = tmp_path_factory.mktemp("sharded")
    runs = []
    for case, settings in CASES.items():
        places = {"base": decoders[decoder_of(case)], "out": root / case / "out", "gradients": root / case / "g"}
        (root / case).mkdir()
        runs.append(places | {"data": few, "shard": True} | settings)
    succeeded, said = in_two_processes(*runs)
    assert succeeded, said
    return root


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_gradients_the_curve_and_the_weights_of_one(case, decoders, few, tuned_by_two, tmp_path):
    decode, sharded = decoders[decoder_of(case)], tuned_by_two / case
    config = FAST.replace(**CASES[case])
    expected = first_gradients(decode, tmp_path / "again", few, config)
    ours = gathered([sharded / f"g.{rank}" for rank in range(2)])
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item(), msg=name)
    one = qsun.tune(decode, tmp_path / "one", few, config, device="cpu")
    two = json.loads((sharded / "out" / "report.json").read_text())
    same_curve(two, one)
    assert (two["processes"], two["tuned_weights"]) == (2, one["tuned_weights"])
    file = "adapter_model.safetensors" if config.lora_rank else "model.safetensors"
    tuned, alone = load_file(sharded / "out" / file), load_file(tmp_path / "one" / file)
    base = {} if config.lora_rank else load_file(base_directory() / file)
    assert tuned.keys() == alone.keys()
    for name, tensor in alone.items():
        # AdamW divides a gradient by its size, even one that is little more than rounding (one head's is 5,000 times
        # smaller than another's in an adapter here), and what is stored is rounded to bfloat16. On average, weights
        # differ by less than a fiftieth of what tuning changed (measured: up to 0.006), and no row of a matrix is off
        # by a quarter (0.044), as one would be that was not updated once.
        start = base.get(name, torch.zeros_like(tensor) if "lora_B" in name else None)
        changed = torch.tensor(2e-3) if start is None else distance(tensor, start)
        apart = distance(tuned[name], tensor)
        assert apart.mean() <= 0.02 * changed.mean(), name
        assert (apart <= 0.25 * changed.clamp(min=changed.mean())).all(), name
        assert name not in base or torch.equal(tensor, base[name]) == torch.equal(tuned[name], base[name]), name


@pytest.mark.slow
def test_a_stopped_run_goes_on(few, tmp_path):
    """In two processes that share the weights out or each hold all of them, and in one."""
    common = {"base": "demo", "data": few}
    succeeded, said = in_two_processes(common | {"out": tmp_path / "out", "stop": 5, "shard": True})
    assert not succeeded and "KeyboardInterrupt" in said
    kept = [path for path in (tmp_path / "out.partial").rglob("*") if path.is_file() and path.name != "lock"]
    assert {path.suffix for path in kept} == {".safetensors", ".json"}
    ways = [tmp_path / name for name in ("sharded", "whole", "alone")]
    for out in ways:
        shutil.copytree(tmp_path / "out.partial", f"{out}.partial")
    succeeded, said = in_two_processes(*(common | {"out": out, "shard": out.name == "sharded"} for out in ways[:2]))
    assert succeeded, said
    qsun.tune("demo", ways[2], few, FAST, device="cpu", resume=True)
    expected = qsun.tune("demo", tmp_path / "expected", few, FAST, device="cpu")
    for out in ways:
        same_curve(json.loads((out / "report.json").read_text()), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "int4"])
def test_each_process_holds_half_of_the_weights(name, decoders, few, tuned_by_two, tmp_path):
    # One process alone may keep dequantized copies; what is counted is parameters and buffers.
    whole = held_bytes(decoders[name], tmp_path / "one", few)
    for rank in range(2):
        assert json.loads((tuned_by_two / name / f"g.{rank}.json").read_text()) < 0.55 * whole


def test_the_plan_says_what_is_shared_out(cli, few, tmp_path):
    plans = []
    for option in ([], ["--shard"]):
        answer = cli("tune", "demo", "-o", tmp_path / "out", "--data", few, *option, "--dry-run", "--json")
        plans.append(json.loads(answer.out))
    assert plans[0]["shared_bytes"] == 0 < plans[1]["shared_bytes"] < plans[1]["memory_bytes"]
    assert (
        "sharded over 1 processes"
        in cli("tune", "demo", "-o", tmp_path / "out", "--data", few, "--shard", "--dry-run").out
    )


@pytest.mark.parametrize("cuts", [[0, 7], [0, 4, 7], [0, 3, 6, 7], [0, 7, 7]])
def test_rows_that_processes_wrote_are_read_by_any_number_of_others(cuts, tmp_path):
    whole = torch.arange(21.0).reshape(7, 3)
    with Workdir(tmp_path / "out", {}, resume=False) as work:
        for rank, (first, last) in enumerate(pairwise(cuts)):
            held = {"w": whole[first:last].clone()} if last > first else {}
            work.write(f"part-{rank}", held | {"step": torch.tensor(4.0)}, {})
    files = [Checkpoint(work.part(f"part-{rank}")) for rank in range(len(cuts) - 1)]
    kept = SplitTensors(files)
    assert set(kept) == {"w", "step"} and torch.equal(kept["w"], whole)
    for first in range(7):
        for last in range(first + 1, 8):
            assert torch.equal(kept.rows("w", first, last), whole[first:last])
    assert kept.rows("step", 0, 3).item() == 4
