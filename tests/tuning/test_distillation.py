"""`qsun tune --teacher`: the gradient of a step, what is learned, and the teacher's own answers."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import qsun
from qsun.model.lora import place_adapter
from qsun.model.output_dir import Workdir
from qsun.runtime.seam import collate
from qsun.tuning.examples import Batches, crosses
from qsun.tuning.job import prepare_tuning
from qsun.tuning.processes import Processes
from qsun.tuning.teacher import answer_prompts
from qsun.tuning.tuner import Tuner
from tests.seam_oracle import monolithic_logits, seam_logits
from tests.tiny_models import write_jsonl
from tests.tuning.test_tuner import FAST, same_curve, sums
from tests.tuning.tune_in_parallel import first_gradients, in_two_processes

PROMPTS = [{"prompt": row["prompt"]} for row in sums(20, seed=3)]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "few.jsonl", sums(40))


@pytest.fixture(scope="module")
def teachers(talking_model, few, tmp_path_factory):
    """A conventional fine-tune, a SUN pair's prefill module, and an ordinary adapter."""
    root = tmp_path_factory.mktemp("teachers")
    config = FAST.replace(steps=20, lr=1e-2)
    qsun.tune(talking_model, root / "full", few, config.replace(baseline="full"), device="cpu")
    qsun.tune(talking_model, root / "pair", few, config, device="cpu")
    qsun.tune(talking_model, root / "adapter", few, config.replace(lora_rank=4), device="cpu")
    (root / "adapter" / "qsun.json").unlink()
    return {name: root / name for name in ("full", "pair", "adapter")}


@pytest.fixture(scope="module")
def decode(talking_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("decode") / "int2"
    qsun.quantize(talking_model, out, qsun.QuantConfig(method="rtn", bits=2, group_size=32))
    return out


def divergence(theirs, ours, labels):
    """KL by its definition in float64, and cross-entropy, summed over response tokens."""
    p, q = (logits.double().softmax(-1) for logits in (theirs, ours))
    rows = labels != -100
    kl = (p * (p.log() - q.log())).sum(-1)[rows].sum()
    return kl, -q.log().gather(-1, labels.clamp(min=0)[..., None])[..., 0][rows].sum()


@pytest.mark.parametrize("kind", ["full", "pair", "adapter"])
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_gradients_of_a_step(kind, weight, teachers, decode, talking_model, few, tmp_path):
    """Oracle: the whole logits of both, and autograd."""
    config = FAST.replace(lora_rank=2, lr=1e-3, teacher_weight=weight)
    ours = first_gradients(decode, tmp_path / "out", few, config, teacher=teachers[kind])
    job = prepare_tuning(decode, tmp_path / "job", few, config, teacher=teachers[kind], device="cpu")
    student = qsun.load_decode(talking_model, "cpu", "float32").model
    place_adapter(student, job.first_adapter(student))
    order = Batches(job.train, config.batch_size, config.seed).of_step(0)
    batch = collate(order)
    reader = qsun.load_decode(decode, "cpu", "float32").model
    taught = qsun.load_prefill(teachers[kind], dtype="float32", device="cpu").model
    with torch.no_grad():
        base = qsun.load_decode(talking_model, "cpu", "float32").model
        theirs = seam_logits(taught, base, batch) if kind == "pair" else monolithic_logits(taught, batch)
    kl, likelihood = divergence(theirs, seam_logits(student, reader, batch), batch.labels)
    tokens = sum(len(example.response) for example in order)
    ((weight * kl + (1 - weight) * likelihood) / tokens).backward()
    for name, gradient in ours.items():
        wanted = student.get_parameter(name).grad
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-5 * wanted.abs().max().item(), msg=name)


def test_a_module_learns_its_teacher(teachers, decode, few, tmp_path):
    config = FAST.replace(steps=20, lr=1e-2)
    report = qsun.tune(decode, tmp_path / "out", few, config, teacher=teachers["pair"], device="cpu")
    assert report["best_valid_loss"] < 0.7 * report["valid_loss"][0][1]
    assert report["saved_valid_loss"] == pytest.approx(report["best_valid_loss"], rel=0.02, abs=1e-3)
    made = json.loads((tmp_path / "out" / "qsun.json").read_text())
    assert made["teacher"] == report["teacher"] == str(teachers["pair"])


def test_a_module_that_is_its_teacher_starts_at_zero(teachers, talking_model, few, tmp_path):
    report = qsun.tune(
        talking_model, tmp_path / "out", few, FAST.replace(steps=1, lr=1e-6), init=teachers["pair"],
        teacher=teachers["pair"], device="cpu",
    )  # fmt: skip
    assert abs(report["valid_loss"][0][1]) < 1e-5


# --- prompts without responses


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    chat = {"messages": [{"role": "user", "content": "Tom has 3."}]}
    rows = [*PROMPTS, chat, {"question": "Ann?"}, {"prompt": "x", "response": None}, *sums(6)]
    return write_jsonl(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", rows)


ANSWERED = FAST.replace(teacher_tokens=5, lora_rank=2)


def test_the_teachers_own_answers(teachers, decode, talking_model, prompts, tmp_path):
    """Oracle: they are what `generate` answers; given as data, they make the same module."""
    job = prepare_tuning(decode, tmp_path / "plan", prompts, ANSWERED, teacher=teachers["pair"], device="cpu")
    assert job.plan()["unanswered"] == 23
    report = qsun.tune(decode, tmp_path / "out", prompts, ANSWERED, teacher=teachers["pair"], device="cpu")
    base = qsun.load_decode(talking_model, "cpu", "float32")
    pair = qsun.load_prefill(teachers["pair"], base, "float32")

    def told(examples):
        missing = [list(e.prompt) for e in examples if not e.response]
        given = iter(qsun.generate(pair, base, missing, max_new_tokens=5))
        return [e if e.response else replace(e, response=tuple(next(given))) for e in examples]

    whole = replace(job, train=told(job.train), valid=told(job.valid))
    with Workdir(tmp_path / "oracle", {}, resume=False) as work:
        tuner = Tuner(whole, work, Processes(torch.device("cpu")))
        tuner.run(lambda *_: None)
    assert report["train_loss"] == tuner.train_loss
    assert report["valid_loss"] == tuner.valid_loss


def test_a_stopped_run_keeps_the_answers(teachers, decode, prompts, tmp_path, monkeypatch):
    whole = qsun.tune(decode, tmp_path / "whole", prompts, ANSWERED, teacher=teachers["full"], device="cpu")
    arguments = (decode, tmp_path / "out", prompts, ANSWERED)

    def stop(label, done, _):
        if label.startswith("loss") and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qsun.tune(*arguments, teacher=teachers["full"], device="cpu", progress=stop)
    monkeypatch.setattr("qsun.tuning.teacher.generate_stream", None)
    report = qsun.tune(*arguments, teacher=teachers["full"], device="cpu", resume=True)
    assert report["train_loss"] == whole["train_loss"]
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "whole")]
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())


def longrope_model(tiny_model, talking_model, directory, boundary, **changes):
    """A tiny Phi 3 that can be given text; its RoPE changes at so many tokens."""
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": boundary,
        "short_factor": [1.0] * 8, "long_factor": [1.0 + 4 * i for i in range(8)],
    }  # fmt: skip
    made = tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=boundary, **changes)
    shutil.copytree(made, directory)
    for file in talking_model.glob("tokenizer*"):
        shutil.copyfile(file, directory / file.name)
    return directory


def answered(job):
    with Workdir(job.out, job.settings(), resume=False) as work:
        return answer_prompts(job, work, Processes(job.device), lambda *_: None)


def test_answers_end_where_rope_changes(tiny_model, talking_model, few, tmp_path):
    model = longrope_model(tiny_model, talking_model, tmp_path / "model", boundary=32)
    data = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "7" * n} for n in range(24, 44)])
    config = FAST.replace(teacher_tokens=5, max_len=40)
    job = prepare_tuning(model, tmp_path / "out", data, config, eval_data=few, teacher=model, device="cpu")
    lengths = {len(e.prompt) for e in job.train}
    assert set(range(28, 40)) - lengths == {33}  # 32 read tokens, and not one more has room
    for example in answered(job).train:
        n, room = len(example.prompt), len(example.response)
        assert 1 <= room <= min(5, 33 - n if n < 33 else 40 - n)
        assert not crosses(example, 32)


def test_a_teachers_limits_on_length_hold_too(tiny_model, talking_model, decode, few, tmp_path):
    """The decode module has room for 128 tokens and one set of RoPE factors."""
    teacher = longrope_model(tiny_model, talking_model, tmp_path / "phi", boundary=30, max_position_embeddings=36)
    data = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "7" * n} for n in range(24, 60)])
    config = FAST.replace(teacher_tokens=8)
    job = prepare_tuning(decode, tmp_path / "out", data, config, eval_data=few, teacher=teacher, device="cpu")
    lengths = {len(e.prompt) for e in job.train}
    assert set(range(28, 40)) & lengths == {28, 29, 30, 32, 33, 34, 35}
    assert job.too_long == 36 - len(job.train) - 1
    for example in answered(job).train:
        n = len(example.prompt)
        assert 1 <= len(example.response) <= min(8, 31 - n if n < 31 else 37 - n)


def test_a_run_that_is_stopped_while_the_teacher_answers_asks_for_the_rest_only(
    teachers, decode, prompts, tmp_path, monkeypatch
):
    monkeypatch.setattr("qsun.tuning.teacher._BATCHES_IN_A_PART", 1)
    setup = {"teacher": teachers["full"], "device": "cpu"}
    whole = answered(prepare_tuning(decode, tmp_path / "whole", prompts, ANSWERED, **setup))
    job = prepare_tuning(decode, tmp_path / "out", prompts, ANSWERED, **setup)
    told = []

    def stop(label, done, total):
        told.append(done)
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Workdir(job.out, job.settings(), resume=False) as work:
        answer_prompts(job, work, Processes(job.device), stop)
    told.clear()
    with Workdir(job.out, job.settings(), resume=True) as work:
        resumed = answer_prompts(job, work, Processes(job.device), lambda _, done, __: told.append(done))
    assert told == list(range(9, 24))  # two parts of 4 prompts were kept
    assert (resumed.train, resumed.valid) == (whole.train, whole.valid)


@pytest.mark.slow
def test_a_process_waits_for_the_first_ones_answers_longer_than_torch_does(teachers, decode, prompts, tmp_path):
    """The first answer takes longer than the process group's timeout."""
    run = {"base": decode, "out": tmp_path / "out", "data": prompts, "teacher": teachers["full"], "teacher_tokens": 5}
    succeeded, said = in_two_processes(run | {"lora_rank": 2, "timeout_s": 15, "pause_s": 18})
    assert succeeded, said
    assert (tmp_path / "out" / "report.json").exists()


@pytest.mark.slow
def test_two_processes_learn_the_same(teachers, decode, prompts, tmp_path):
    """With all weights in each, and sharded; from a pair and from a whole model."""
    ways = {"whole": ("full", False), "sharded": ("full", True), "pair": ("pair", True), "merged": ("adapter", True)}
    common = {"base": decode, "data": prompts, "teacher_tokens": 5, "lora_rank": 2}
    succeeded, said = in_two_processes(
        *(
            common | {"out": tmp_path / way, "teacher": teachers[kind], "shard": shard}
            for way, (kind, shard) in ways.items()
        )
    )
    assert succeeded, said
    for way, (kind, _) in ways.items():
        one = qsun.tune(decode, tmp_path / f"{way}-alone", prompts, ANSWERED, teacher=teachers[kind], device="cpu")
        report = json.loads((tmp_path / way / "report.json").read_text())
        same_curve(report, one)
        assert report["saved_valid_loss"] == pytest.approx(one["saved_valid_loss"], rel=1e-3)


def test_without_a_teacher_a_response_is_needed(cli, prompts, tmp_path):
    answer = cli("tune", "demo", "-o", tmp_path / "out", "--data", prompts)
    assert answer.code == 2
    assert "needs 'messages', or 'prompt' and 'response'" in answer.err


# --- teachers that do not fit


@pytest.mark.parametrize(
    ("teacher", "options", "says"),
    [
        ("/nowhere/model", (), "/nowhere/model is not a directory"),
        ("pair", ("--teacher-weight", 1.5), "teacher_weight 1.5 is out of range"),
    ],
)
def test_what_cannot_teach(teacher, options, says, teachers, decode, few, cli, tmp_path):
    name = teachers.get(teacher, teacher)
    answer = cli("tune", decode, "-o", tmp_path / "out", "--data", few, "--teacher", name, *options)
    assert answer.code == 2
    assert says in answer.err and len(answer.err.splitlines()) == 1


def test_another_vocabulary(teachers, decode, few, tiny_model, tmp_path):
    with pytest.raises(qsun.QsunError, match="has 160 tokens, the decode module 128; use one of its base"):
        prepare_tuning(decode, tmp_path / "out", few, teacher=tiny_model("qwen2", vocab_size=160))
    other = tmp_path / "other"
    shutil.copytree(teachers["full"], other)
    text = (other / "tokenizer.json").read_text()
    values = json.loads(text)
    vocabulary = values["model"]["vocab"]
    names = list(vocabulary)[-2:]
    vocabulary[names[0]], vocabulary[names[1]] = vocabulary[names[1]], vocabulary[names[0]]
    (other / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(qsun.QsunError, match=r"has another vocabulary: token .* is \d+ there and \d+ in the decode"):
        prepare_tuning(decode, tmp_path / "out", few, teacher=other)


def test_a_pair_whose_decode_module_is_gone(teachers, decode, few, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(teachers["pair"], moved)
    made = json.loads((moved / "qsun.json").read_text())
    (moved / "qsun.json").write_text(json.dumps(made | {"decode": "/nowhere/int4"}))
    with pytest.raises(qsun.QsunError, match="is a prefill module of /nowhere/int4, which was not found"):
        prepare_tuning(decode, tmp_path / "out", few, teacher=moved)
