"""The speed bench: modules that are what they are called, honest arithmetic, and every column filled."""

import json

import pytest
import torch

import qsun
from qsun.engine.decode.decode_step import DecodeStep
from qsun.errors import QsunError
from qsun.eval.load.percentiles import percentile
from qsun.eval.simulate.curves import measured_curves
from qsun.eval.speed import contenders as speed_modules
from qsun.eval.speed import decode_speed as speed
from qsun.eval.speed.contenders import GRID, loaded_contenders, made_contenders
from qsun.eval.speed.decode_speed import Points, bench_speed, filled_batch, step_seconds
from qsun.eval.speed.model_shapes import MODEL_SHAPES, ModelShape
from qsun.quantization.methods.rtn import rtn
from qsun.runtime.kv_cache import kv_bytes_per_token
from qsun.runtime.quant_linear import QuantLinear

CPU = torch.device("cpu")
TINY = ModelShape(hidden=128, layers=2, heads=4, kv_heads=2, head_dim=32, intermediate=256, vocab=384, tied=True)
TINY_QWEN = ModelShape(hidden=128, layers=2, heads=4, kv_heads=2, head_dim=64, intermediate=256, vocab=384)
BLOCK = 128 * (128 + 2 * 64) + 128 * 128 + 3 * 128 * 256  # weights of one of TINY's blocks


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(MODEL_SHAPES, "tiny", TINY)
    monkeypatch.setitem(MODEL_SHAPES, "qwen3-tiny", TINY_QWEN)
    monkeypatch.setitem(speed._COPY_BYTES, "cpu", 1 << 20)


def run(head="both", **points):
    wanted = {"batches": (1, 16), "contexts": (8, 24), "steps": 4, "seconds": 5.0} | points
    return bench_speed(made_contenders("tiny", head, CPU), Points(**wanted))


def test_every_variant_at_every_point_with_consistent_columns():
    result = run()
    points = [(context, batch) for context in (8, 24) for batch in (1, 16)]
    variants = ("sun", "qsun", "qsun+head")
    found = [(row["context"], row["batch"], row["variant"]) for row in result["rows"]]
    assert found == [(*point, variant) for point in points for variant in variants]
    sun = {(row["context"], row["batch"]): row["tpot_ms"] for row in result["rows"] if row["variant"] == "sun"}
    for row in result["rows"]:
        tpot = row["tpot_ms"]
        assert row["lm_head"] == {"sun": "bf16", "qsun": "bf16", "qsun+head": "int4"}[row["variant"]]
        assert row["tokens_per_s"] == pytest.approx(1000 * row["batch"] / tpot)
        assert row["ratio_to_sun"] == pytest.approx(sun[row["context"], row["batch"]] / tpot)
        assert row["ttft_ms"] == pytest.approx(row["prefill_ms"] + tpot)
        assert row["prefill_ms"] > 0
        assert tpot <= row["tpot_p95_ms"]
        assert row["kv_bytes"] == 2 * 2 * row["batch"] * row["context"] * 2 * 32 * 2  # K and V, layers, heads, bf16
        moved = row["weight_bytes"] + row["kv_bytes"]
        assert row["floor_ms"] == pytest.approx(moved / result["copy_gb_per_s"] / 1e6)
        assert row["bandwidth_percent"] == pytest.approx(100 * row["floor_ms"] / tpot)
        assert row["steps"] == 4


def test_the_prefill_curve_has_contexts_and_further_prompts():
    result = run(batches=(1,), prompts=(4, 16))
    assert [point["tokens"] for point in result["prefill"]] == [4, 8, 16, 24]
    assert {row["context"]: row["prefill_ms"] for row in result["rows"]}.items() <= {
        point["tokens"]: point["ms"] for point in result["prefill"]
    }.items()
    curves = measured_curves(result | {"machine": "here"})
    assert curves.prefill(16) == pytest.approx(result["prefill"][2]["ms"] / 1000)
    assert curves.step("qsun", 1, 8) == pytest.approx(result["rows"][1]["tpot_ms"] / 1000)


def test_weight_bytes(monkeypatch):
    monkeypatch.setattr("qsun.kernels.int4pack_cpu.int4_wins", lambda rows: rows <= 8)
    rows = {(row["variant"], row["batch"]): row["weight_bytes"] for row in run(contexts=(8,))["rows"]}
    head, norms = 2 * 128 * 384, 2 * 128 * (2 * TINY.layers + 1)
    full = 2 * TINY.layers * BLOCK
    integers = BLOCK * TINY.layers // 2 + 4 * BLOCK * TINY.layers // 128  # op's layout: scale and zero in bf16
    for batch in (1, 16):
        embedding = 2 * 128 * batch
        blocks = integers if batch == 1 else full  # 16 rows take the dequantized copies
        small_head = 128 * 384 // 2 + 4 * 384 if batch == 1 else head
        assert rows["sun", batch] == full + head + norms + embedding
        assert rows["qsun", batch] == blocks + head + norms + embedding
        assert rows["qsun+head", batch] == blocks + small_head + norms + embedding


@pytest.mark.parametrize(("shape", "family"), [("tiny", "llama"), ("qwen3-tiny", "qwen3")])
@torch.no_grad()
def test_the_int4_module_is_the_full_one_rounded_to_nearest(shape, family):
    """Held to a model whose matrices were rounded one by one, and the two heads to each other."""
    made = made_contenders(shape, "both", CPU)
    assert {model.config.model_type for model in made.decode.values()} == {family}
    ids = torch.randint(384, (2, 5))
    got, with_head = (made.decode[name](ids).logits.float() for name in ("qsun", "qsun+head"))
    full = made.decode["sun"]
    plain = full(ids).logits.float()
    for block in full.model.layers:
        for module in block.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(rtn(module.weight, GRID, scale_search=False).dequantize())
    wanted = full(ids).logits.float()
    head = rtn(full.lm_head.weight, GRID, scale_search=False).dequantize().bfloat16()
    full.lm_head.weight = torch.nn.Parameter(head)
    wanted_with_head = full(ids).logits.float()

    def error(logits, reference):
        return float((logits - reference).norm() / reference.norm())

    assert error(got, wanted) < 0.02
    assert error(with_head, wanted_with_head) < 0.02
    assert error(plain, wanted) > 0.05  # so the bounds above tell rounded weights from others
    assert error(wanted_with_head, wanted) > 0.05


def test_what_is_not_quantized_is_shared():
    made = made_contenders("tiny", "both", CPU)
    sun, quantized, head = made.decode.values()
    assert quantized.lm_head.weight is sun.model.embed_tokens.weight
    assert head.model is quantized.model
    assert isinstance(head.lm_head, QuantLinear)
    assert not isinstance(quantized.lm_head, QuantLinear)
    assert made.prefill is sun


@pytest.mark.parametrize(("head", "variants"), [("bf16", {"sun", "qsun"}), ("int4", {"sun", "qsun+head"})])
def test_one_head(head, variants):
    assert set(made_contenders("tiny", head, CPU).decode) == variants


def test_decode_modules_of_other_bits():
    made = made_contenders("tiny", "bf16", CPU, bits=(4, 2))
    assert list(made.decode) == ["sun", "qsun", "qsun-2bit"]
    layers = [[m.bits for m in model.modules() if isinstance(m, QuantLinear)] for model in made.decode.values()]
    assert [set(bits) for bits in layers] == [set(), {4}, {2}]
    assert made_contenders("tiny", "both", CPU, bits=(2,)).decode.keys() == {"sun", "qsun-2bit"}
    with pytest.raises(QsunError, match="bits 5 is not supported; use 2, 3, 4, 8"):
        made_contenders("tiny", "bf16", CPU, bits=(5,))


def test_contenders_take_turns_and_the_middle_step_sees_the_context(monkeypatch):
    calls = []

    class Watched(DecodeStep):
        def __call__(self, tokens):
            calls.append((self.model, self.cache.filled[0] + 1))
            return super().__call__(tokens)

    monkeypatch.setattr("qsun.engine.decode_batch.DecodeStep", Watched)
    models = made_contenders("tiny", "bf16", CPU).decode
    step_seconds(models, 2, 40, Points(steps=5))
    assert [model for model, _ in calls] == list(models.values()) * 7  # with two steps of warm-up
    timed = [length for model, length in calls if model is models["sun"]][2:]
    assert timed == [38, 39, 40, 41, 42]


def test_time_is_up():
    taken = step_seconds(made_contenders("tiny", "bf16", CPU).decode, 1, 8, Points(steps=50, seconds=1e-9))
    assert {name: len(times) for name, times in taken.items()} == {"sun": 3, "qsun": 3}


def test_a_filled_cache_has_no_empty_column():
    cache = filled_batch(made_contenders("tiny", "bf16", CPU).prefill, 3, 6, 4).cache
    assert len(cache.buffers) == TINY.layers
    for keys, values in cache.buffers:
        assert (keys[:3, :, :6].abs().sum(-1) > 0).all()
        assert (values[:3, :, :6].abs().sum(-1) > 0).all()


def test_percentile():
    assert percentile(range(1, 101), 0.95) == 95
    assert percentile([3, 1, 2], 0.95) == 3


def test_points_that_do_not_fit_are_left_out(monkeypatch):
    notes = []
    monkeypatch.setattr(speed, "available_after_release", lambda _: 100_000)  # KV of two modules: 25,600 and 409,600
    rows = bench_speed(made_contenders("tiny", "bf16", CPU), Points((1, 16), (24,), 4), notes.append)["rows"]
    assert {row["batch"] for row in rows} == {1}
    assert any(note.startswith("batch 16, context 24 left out") for note in notes)


def test_points_are_measured_by_what_their_caches_take():
    """Also on a GPU, where rows and columns are rounded up."""
    model, points = made_contenders("tiny", "bf16", CPU).prefill, Points((3,), (300,), 8)
    taken = []
    for static in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qsun.engine.decode.fixed_slots.has_fixed_shapes", lambda *_, given=static: given)
            patch.setattr("qsun.engine.decode_batch.has_fixed_shapes", lambda *_, given=static: given)
            cache = filled_batch(model, 3, *speed._filled_and_steps(300, points)).cache
            taken.append(speed._kv_bytes_taken(model, 3, 300, points))
        assert taken[-1] == cache.budget_tokens * kv_bytes_per_token(model.config, torch.bfloat16)
        rows, columns = cache.capacity
        assert rows * columns <= cache.budget_tokens
    assert taken[1] == 4 * 384 * taken[0] // (3 * 303)


@pytest.fixture
def on_disk(tiny_model, tmp_path):
    """A decode module and its base."""
    base = tiny_model("llama", torch.bfloat16)
    qsun.quantize(base, tmp_path / "q", qsun.QuantConfig(method="rtn", group_size=32, lm_head=True), device="cpu")
    return tmp_path / "q", base


def test_modules_on_disk(on_disk):
    made = loaded_contenders(*map(str, on_disk), CPU)
    assert made.head == {"sun": "bf16", "qsun+head": "int4"}
    alone = loaded_contenders(str(on_disk[0]), None, CPU)
    ids = torch.randint(128, (2, 5))
    logits = [model(ids).logits.float() for model in alone.decode.values()]
    assert not any(isinstance(module, QuantLinear) for module in alone.decode["sun"].modules())
    torch.testing.assert_close(*logits, rtol=0.05, atol=0.1)  # bf16, summed in other orders


def test_command(cli, tmp_path):
    options = ("--batches", "1,2", "--contexts", 8, "--steps", 3, "--threads", 1, "--lm-head", "bf16")
    answer = cli("bench", "speed", "--shape", "tiny", *options, "--json", "-o", tmp_path)
    result = json.loads(answer.out)
    assert [(row["batch"], row["variant"]) for row in result["rows"]] == [
        *((1, "sun"), (1, "qsun"), (2, "sun"), (2, "qsun"))
    ]
    assert json.loads((tmp_path / "speed.json").read_text()) == result
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_command_on_modules(cli, on_disk):
    options = ("--batches", 1, "--contexts", 8, "--steps", 3, "--threads", 1)
    answer = cli("bench", "speed", "--decode", on_disk[0], "--base", on_disk[1], *options)
    lines = answer.out.splitlines()
    assert [line.split()[:4] for line in lines[2:]] == [["sun", "bf16", "1", "8"], ["qsun+head", "int4", "1", "8"]]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--shape", "gpt-5"), "shape 'gpt-5' is not known; use one of llama-3.1-8b, llama-3.2-1b"),
        (("--shape", "tiny", "--lm-head", "fp8"), "lm-head 'fp8' is not known; use one of bf16, int4, both"),
        (("--shape", "tiny", "--batches", "1,x"), "batches has x; use whole numbers"),
        (("--shape", "tiny", "--batches", "0"), "batches has 0; use whole numbers from 1 up"),
        (("--shape", "tiny", "--contexts", ","), "contexts has nothing"),
        (("--shape", "tiny", "--contexts", "200000"), "context 200000 leaves no room"),
        (("--shape", "tiny", "--steps", "0"), "steps has 0"),
        (("--shape", "tiny", "--seconds", "0"), "seconds 0 is out of range"),
        (("--shape", "tiny", "--decode", "x"), "not both"),
        (("--shape", "tiny", "--base", "x"), "--base needs --decode"),
        (("--batches", "1"), "give either --shape NAME or --decode DIR"),
        (("--decode", "demo"), "is not quantized; give the int4 decode module"),
        (("--decode", "nowhere"), "nowhere is not a directory"),
    ],
)
def test_bad_input_is_one_line(options, says, cli):
    answer = cli("bench", "speed", *options)
    assert answer.code == 2
    assert says in answer.err
    assert answer.err.count("\n") == 1


def test_a_base_of_another_size(on_disk, tiny_model):
    with pytest.raises(QsunError, match=r"3 layers of 64, vocabulary 128, .* has 2 layers"):
        loaded_contenders(str(on_disk[0]), str(tiny_model("llama", torch.bfloat16, num_hidden_layers=3)), CPU)


def test_a_shape_beyond_memory(monkeypatch):
    monkeypatch.setattr(speed_modules, "available_bytes", lambda *_: 10**9)
    with pytest.raises(QsunError, match=r"llama-3.2-1b in bf16 and int4 needs 3\.\d GB and 1.0 GB are free; take a"):
        made_contenders("llama-3.2-1b", "bf16", CPU)
