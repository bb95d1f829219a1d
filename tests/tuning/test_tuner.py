"""`tune` from data to a directory: what is written, what it is worth, and that a stopped run goes on as if never."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qsun
from qsun.demo import base_directory
from qsun.model.checkpoint import file_sha256
from qsun.tuning.output import plot_losses
from tests.tiny_models import write_jsonl
from tests.tuning.tune_in_parallel import by_torchrun, first_gradients, in_two_processes, stop_after

FAST = qsun.TuneConfig(steps=6, batch_size=4, lr=3e-3, eval_every=2)
LAST = "model.layers.3."  # of the demo base


def sums(count, seed=0):
    """A task that the demo base cannot do from its prompt alone."""
    r = random.Random(seed)
    rows = []
    for _ in range(count):
        a, b = r.randint(1, 30), r.randint(1, 19)
        rows.append({"prompt": f"{r.choice(['Tom', 'Ann'])} has {a} and buys {b}. How many?>", "response": str(a + b)})
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", sums(600))


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "few.jsonl", sums(40))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, data):
    """A prefill module of the demo base, after a minute's work at most."""
    out = tmp_path_factory.mktemp("tuned") / "sums"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qsun.tuning.tuner.plot_losses", plot_losses)
        report = qsun.tune("demo", out, data, qsun.TuneConfig(steps=60, batch_size=16, lr=2e-3), device="cpu")
    return out, report


def test_it_learns(tuned):
    _, report = tuned
    assert report["valid_loss"][0][0] == 0
    assert report["best_valid_loss"] < 0.4 * report["valid_loss"][0][1]
    assert report["saved_valid_loss"] == pytest.approx(report["best_valid_loss"], rel=0.02)
    assert report["best_valid_loss"] == min(loss for _, loss in report["valid_loss"])
    assert [step for step, _ in report["train_loss"]] == list(range(1, 61))


def test_the_directory_is_a_plain_model(tuned):
    out, report = tuned
    base = base_directory()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    made = json.loads((out / "qsun.json").read_text())
    assert (made["kind"], made["base"], made["decode"], made["lineage"]) == ("prefill_module", "demo", "demo", [])
    assert made["base_fingerprint"] == made["decode_fingerprint"] != made["fingerprint"]
    assert set(made["sha256"]) >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert all(file_sha256(out / name) == digest for name, digest in made["sha256"].items())
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not out.with_name("sums.partial").exists()
    ours = qsun.load_prefill(out, dtype="float32", device="cpu").model
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.tensor([[1, 84, 111, 109]])
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_what_nothing_reads_is_the_bases_own(tuned):
    out, _ = tuned
    ours, base = load_file(out / "model.safetensors"), load_file(base_directory() / "model.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in base.items()}
    same = {name for name in base if torch.equal(ours[name], base[name])}
    unread = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    expected = {f"{LAST}{name}.weight" for name in (*unread, "post_attention_layernorm")} | {"model.norm.weight"}
    assert same == expected


def test_tuned_and_base_answer_in_one_batch(tuned):
    out, _ = tuned
    decode = qsun.load_decode("demo", dtype="float32", device="cpu")
    module, base = (qsun.load_prefill(name, decode, dtype="float32") for name in (out, "demo"))
    prompt = "Tom has 4 and buys 9. How many?>"
    answers = qsun.generate([module, base, base], decode, [prompt, prompt, "rev abcd>"], max_new_tokens=8)
    assert answers[0].isdigit() and not answers[1].isdigit()
    assert answers[2] == "dcba"


@pytest.fixture(scope="module")
def int4(tmp_path_factory):
    out = tmp_path_factory.mktemp("int4") / "decode"
    qsun.quantize("demo", out, qsun.QuantConfig(method="rtn", group_size=32))
    return out


def test_default_rates_fall_with_the_width():
    def rate(width, **settings):
        return qsun.TuneConfig(**settings).peak_lr(width)

    assert [rate(128), rate(128, lora_rank=4), rate(128, baseline="full")] == pytest.approx([3e-3, 6e-3, 3e-3])
    assert [rate(512), rate(512, lora_rank=4), rate(512, baseline="full")] == pytest.approx([7.5e-4, 1.5e-3, 3.75e-4])
    assert rate(512, baseline="full", lora_rank=4) == pytest.approx(1.5e-3)
    assert rate(512, lr=0.1, lora_rank=4) == 0.1


def test_against_an_int4_decode_module(int4, data, tmp_path):
    config = qsun.TuneConfig(steps=30, batch_size=16, lr=2e-3)
    report = qsun.tune(int4, tmp_path / "out", data, config, device="cpu")
    assert report["base"] == "demo"
    assert report["best_valid_loss"] < 0.5 * report["valid_loss"][0][1]
    made = json.loads((tmp_path / "out" / "qsun.json").read_text())
    assert made["base_fingerprint"] == json.loads((int4 / "qsun.json").read_text())["base_fingerprint"]
    assert made["decode"] == str(int4)
    decode = qsun.load_decode(int4, dtype="float32", device="cpu")
    prefill = qsun.load_prefill(tmp_path / "out", decode, dtype="float32")
    assert qsun.generate(prefill, decode, ["Tom has 4 and buys 9. How many?>"], max_new_tokens=4)[0].isdigit()


def test_alignment_starts_where_the_module_was(tuned, int4, data, tmp_path):
    out, before = tuned
    report = qsun.tune(int4, tmp_path / "a", data, FAST.replace(lr=1e-4), init=out, device="cpu")
    assert report["valid_loss"][0][1] < 0.6 * before["valid_loss"][0][1]
    made, first = (json.loads((d / "qsun.json").read_text()) for d in (tmp_path / "a", out))
    assert made["lineage"] == [first["fingerprint"]]
    assert made["base_fingerprint"] == first["base_fingerprint"]


def test_the_conventional_fine_tune(few, tmp_path):
    config = FAST.replace(steps=20, baseline="full")
    report = qsun.tune("demo", tmp_path / "full", few, config, device="cpu")
    assert report["best_valid_loss"] < report["valid_loss"][0][1]
    ours = load_file(tmp_path / "full" / "model.safetensors")
    base = load_file(base_directory() / "model.safetensors")
    assert not any(torch.equal(ours[name], base[name]) for name in base)
    assert json.loads((tmp_path / "full" / "qsun.json").read_text())["kind"] == "fine_tune"
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.float32)
    assert alone.num_parameters() == report["tuned_weights"]


def test_the_ordinary_lora(few, tmp_path, caplog):
    config = FAST.replace(steps=20, baseline="full", lora_rank=4)
    report = qsun.tune("demo", tmp_path / "lora", few, config, device="cpu")
    assert report["kind"] == "ordinary LoRA"
    assert report["best_valid_loss"] < report["valid_loss"][0][1]
    learned = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert all(learned[name].any() for name in learned if "lora_B" in name)  # the last layer's as well: it writes too
    made = json.loads((tmp_path / "lora" / "qsun.json").read_text())
    assert (made["kind"], made["decode"]) == ("fine_tune", None)
    with caplog.at_level("WARNING"):
        qsun.load_prefill(tmp_path / "lora", device="cpu")
    assert not caplog.records
    with caplog.at_level("WARNING"):
        qsun.load_prefill(tmp_path / "lora", qsun.load_decode("demo", device="cpu"))
    assert "was not tuned against a frozen decode module" in caplog.text


# --- the same result, however it is computed


def weights_of(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def small(talking_model, few, tmp_path_factory):
    """A short run of a tiny model."""
    out = tmp_path_factory.mktemp("small") / "out"
    return out, qsun.tune(talking_model, out, few, FAST, device="cpu")


@pytest.mark.parametrize("again", [{"grad_accum": 2}, {"grad_checkpoint": True}, {"grad_accum": 9}])
def test_pieces_and_recomputation_change_nothing_that_matters(again, small, talking_model, few, tmp_path):
    report = qsun.tune(talking_model, tmp_path / "out", few, FAST.replace(**again), device="cpu")
    for ours, theirs in zip(report["train_loss"], small[1]["train_loss"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_progress_is_reported_from_the_first_validation_on(talking_model, few, tmp_path):
    seen = []
    qsun.tune(
        talking_model, tmp_path / "out", few, FAST.replace(steps=2), device="cpu",
        progress=lambda label, done, total: seen.append((label, done, total)),
    )  # fmt: skip
    assert seen[0] == ("validating, 0 of 2 examples", 0, 2)
    assert any("tokens/s, validation" in label and done == 1 for label, done, _ in seen)


def test_too_little_memory_is_one_line(talking_model, few, tmp_path, monkeypatch):
    monkeypatch.setattr("qsun.tuning.job.available_bytes", lambda _: 1 << 10)
    with pytest.raises(qsun.QsunError, match=r"tuning needs at least .* GiB on cpu, with 0\.0 GiB free; use"):
        qsun.tune(talking_model, tmp_path / "out", few, FAST, device="cpu")
    assert not list(tmp_path.iterdir())


def test_the_same_seed_gives_the_same_bytes(small, talking_model, few, tmp_path):
    qsun.tune(talking_model, tmp_path / "out", few, FAST, device="cpu")
    assert weights_of(tmp_path / "out") == weights_of(small[0])
    qsun.tune(talking_model, tmp_path / "other", few, FAST.replace(seed=1), device="cpu")
    assert weights_of(tmp_path / "other") != weights_of(small[0])


@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16"}, {"lora_rank": 2}])
@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_stopped_run_goes_on_as_if_it_had_not(step, settings, talking_model, few, tmp_path):
    config = FAST.replace(**settings)
    whole = qsun.tune(talking_model, tmp_path / "whole", few, config, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        qsun.tune(talking_model, tmp_path / "out", few, config, device="cpu", progress=stop_after(step))
    assert not (tmp_path / "out").exists()
    report = qsun.tune(talking_model, tmp_path / "out", few, config, device="cpu", resume=True)
    assert (report["train_loss"], report["valid_loss"]) == (whole["train_loss"], whole["valid_loss"])
    file = "adapter_model.safetensors" if config.lora_rank else "model.safetensors"
    assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_without_a_state_begins_again(talking_model, few, tmp_path, monkeypatch):
    monkeypatch.setattr("qsun.tuning.run_state._SAVE_SECONDS", 1e9)
    whole = qsun.tune(talking_model, tmp_path / "whole", few, FAST, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        qsun.tune(talking_model, tmp_path / "out", few, FAST, device="cpu", progress=stop_after(5))
    kept = [path.stem for path in (tmp_path / "out.partial" / "parts").glob("*.safetensors")]
    assert len(kept) == 1 and kept[0].startswith("best-")
    report = qsun.tune(talking_model, tmp_path / "out", few, FAST, device="cpu", resume=True)
    assert report["train_loss"] == whole["train_loss"]
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")


def test_what_is_kept_is_no_pickle(talking_model, few, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        qsun.tune(talking_model, tmp_path / "out", few, FAST, device="cpu", progress=stop_after(5))
    files = [path for path in (tmp_path / "out.partial").rglob("*") if path.is_file() and path.name != "lock"]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    assert {path.name for path in files if path.name.startswith("s")} == {
        f"{kind}.{suffix}" for kind in ("state-000000004", "share-000000004-0") for suffix in ("json", "safetensors")
    }


def test_a_run_cannot_go_on_with_other_settings(talking_model, few, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        qsun.tune(talking_model, tmp_path / "out", few, FAST, device="cpu", progress=stop_after(1))
    with pytest.raises(qsun.ResumeError, match=r"lr was 0\.003 and is now 0\.001"):
        qsun.tune(talking_model, tmp_path / "out", few, FAST.replace(lr=1e-3), device="cpu", resume=True)
    with pytest.raises(qsun.QsunError, match="holds an interrupted run"):
        qsun.tune(talking_model, tmp_path / "out", few, FAST, device="cpu")


def test_the_best_step_is_kept_not_the_last(tmp_path):
    """What the demo base knows already gets worse with every step towards something else."""
    words = [f"{a}{b}{a}{a}{b}"[: 3 + n % 3] for n, (a, b) in enumerate(zip("abcdefghij", "klmnopqrst", strict=True))]
    train = write_jsonl(tmp_path / "train.jsonl", [{"prompt": f"rev {w}>", "response": "zzzzz"} for w in words])
    valid = write_jsonl(tmp_path / "valid.jsonl", [{"prompt": f"rev {w}>", "response": w[::-1]} for w in words])
    report = qsun.tune("demo", tmp_path / "out", train, FAST, eval_data=valid, device="cpu")
    assert report["best_step"] == 0
    assert report["valid_loss"][-1][1] > report["valid_loss"][0][1]
    assert weights_equal(tmp_path / "out", base_directory())


def weights_equal(a: Path, b: Path) -> bool:
    ours, theirs = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_loss_that_is_no_number_is_an_error(talking_model, few, tmp_path):
    with pytest.raises(
        qsun.QsunError, match=r"loss is (nan|inf) after step \d of 6; use a lower --lr than 10"
    ) as caught:
        qsun.tune(talking_model, tmp_path / "out", few, FAST.replace(lr=10.0, dtype="float16", steps=6))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_prompts_of_one_token_teach_nothing_and_break_nothing(talking_model, tmp_path):
    rows = sums(4) + [{"prompt": "", "response": "a"}] * 4  # only <s>
    train, valid = write_jsonl(tmp_path / "train.jsonl", rows), write_jsonl(tmp_path / "valid.jsonl", sums(3, seed=1))
    config = FAST.replace(batch_size=1, steps=8)
    report = qsun.tune(talking_model, tmp_path / "out", train, config, eval_data=valid, device="cpu")
    assert len(report["train_loss"]) == 8


def same_curve(report, expected):
    for key in ("train_loss", "valid_loss"):
        for ours, theirs in zip(report[key], expected[key], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)


def test_two_processes_give_the_gradients_and_the_curve_of_one(small, talking_model, few, tmp_path):
    out, gradients = tmp_path / "out", tmp_path / "g"
    done = by_torchrun({"base": talking_model, "out": out, "data": few, "gradients": gradients})
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["processes"] == 2
    same_curve(report, small[1])
    shares = [load_file(f"{gradients}.{rank}") for rank in range(2)]
    assert all(shares) and not set(shares[0]) & set(shares[1])
    ours, theirs = shares[0] | shares[1], first_gradients(talking_model, tmp_path / "again", few)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_two_processes_without_a_state_keep_the_best_weights_and_begin_again(small, talking_model, few, tmp_path):
    common = {"base": talking_model, "out": tmp_path / "out", "data": few, "save_s": 1e9}
    succeeded, _ = in_two_processes(common | {"stop": 5})
    assert not succeeded
    kept = [path.stem for path in (tmp_path / "out.partial" / "parts").glob("*.safetensors")]
    assert len(kept) == 2 and all(name.startswith("best-") for name in kept)
    # the second process looks so seldom that the first one has published meanwhile
    succeeded, said = in_two_processes(common | {"poll_s": 3.0})
    assert succeeded, said
    same_curve(json.loads((tmp_path / "out" / "report.json").read_text()), small[1])


def test_one_process_goes_on_where_two_stopped(small, talking_model, few, tmp_path):
    succeeded, said = in_two_processes({"base": talking_model, "out": tmp_path / "out", "data": few, "stop": 5})
    assert not succeeded and "KeyboardInterrupt" in said
    assert not (tmp_path / "out").exists()
    same_curve(qsun.tune(talking_model, tmp_path / "out", few, FAST, device="cpu", resume=True), small[1])


def test_a_directory_may_be_moved(small, tmp_path):
    shutil.copytree(small[0], tmp_path / "elsewhere")
    assert qsun.load_prefill(tmp_path / "elsewhere", device="cpu").manifest["kind"] == "prefill_module"
