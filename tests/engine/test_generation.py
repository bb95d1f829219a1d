"""Generation over the seam: against transformers' own, against the seam without a cache, and batches against rows."""

import copy
import json
import random

import pytest
import torch

import qsun
from qsun.runtime.prefill_module import PrefillModule
from tests.seam_oracle import greedy_reference
from tests.tiny_models import FAMILIES, build_model, reference

LENGTHS = (1, 5, 30, 2, 17)
NEW = 12


def prompts_of(lengths, seed):
    r = random.Random(seed)
    return [[r.randrange(3, 128) for _ in range(n)] for n in lengths]


def transformers_answer(model, prompt, new_tokens=NEW):
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()


def pair(directory, dtype="float32"):
    decode = qsun.load_decode(directory, dtype=dtype, device="cpu")
    return qsun.load_prefill(directory, decode, dtype=dtype), decode


@pytest.mark.parametrize("family", FAMILIES)
def test_one_model_on_both_sides_is_transformers_generate(family, tiny_model):
    directory = tiny_model(family)
    prefill, decode = pair(directory)
    model, prompts = reference(directory), prompts_of(LENGTHS, seed=1)
    expected = [transformers_answer(model, prompt) for prompt in prompts]
    for settings in ({}, {"static": True}, {"prefill_chunk": 4}, {"batch_size": 2}):
        assert qsun.generate(prefill, decode, prompts, max_new_tokens=NEW, **settings) == expected, settings


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """Three prefill modules and a decode module with nothing in common but their shape."""
    root = tmp_path_factory.mktemp("modules")
    made = [build_model(root / str(seed), "llama", seed=seed) for seed in range(4)]
    decode = qsun.load_decode(made[3], device="cpu")
    return [qsun.load_prefill(directory, decode) for directory in made[:3]], decode


def doubled(model):
    return {name: tensor.double() for name, tensor in model.state_dict().items()}


def test_other_weights_on_both_sides_are_the_seam_without_a_cache(modules):
    (prefill, *_), decode = modules
    prompts = prompts_of((1, 2, 3, 11), seed=2)
    answers = qsun.generate(prefill, decode, prompts, max_new_tokens=8, eos=())
    for prompt, answer in zip(prompts, answers, strict=True):
        states = doubled(prefill.model), doubled(decode.model)
        assert answer == greedy_reference(*states, decode.model.config, prompt, 8)


def mixed(modules, count=32):
    prefills, decode = modules
    prompts = prompts_of([random.Random(i).randrange(1, 40) for i in range(count)], seed=3)
    return [prefills[i % 3] for i in range(count)], decode, prompts


def test_rows_that_are_done_make_room(modules):
    """Rows end at different steps; the others continue unaffected, sampled ones too."""
    prefills, decode, prompts = mixed(modules, 16)
    settings = {"max_new_tokens": 30, "temperature": 1.2, "seed": list(range(16))}
    free = qsun.generate(prefills, decode, prompts, eos=(), **settings)
    ends = [5, 17, 40, 77]
    cut = qsun.generate(prefills, decode, prompts, eos=ends, **settings)
    lengths = set()
    for whole, part in zip(free, cut, strict=True):
        place = min((whole.index(end) + 1 for end in ends if end in whole), default=30)
        lengths.add(place)
        assert part == whole[:place]
    assert len(lengths) > 4


@pytest.mark.parametrize("static", [False, True])
def test_a_mixed_batch_gives_every_row_what_it_gets_alone(modules, static):
    prefills, decode, prompts = mixed(modules)
    together = qsun.generate(prefills, decode, prompts, max_new_tokens=NEW, static=static)
    alone = [
        qsun.generate(module, decode, [prompt], max_new_tokens=NEW)[0]
        for module, prompt in zip(prefills, prompts, strict=True)
    ]
    assert together == alone
    swapped = qsun.generate([*prefills[1:], prefills[0]], decode, prompts, max_new_tokens=NEW)
    assert sum(a != b for a, b in zip(together, swapped, strict=True)) > 16  # the module matters, so the test can fail


def test_a_sampled_row_does_not_depend_on_its_batch(modules):
    prefills, decode, prompts = mixed(modules, 9)
    settings = {"max_new_tokens": NEW, "temperature": 1.5, "top_p": 0.95, "top_k": 50}
    seeds = [7 * i for i in range(9)]
    together = qsun.generate(prefills, decode, prompts, seed=seeds, **settings)
    for row in (8, 3, 0):
        alone = qsun.generate(prefills[row], decode, [prompts[row]], seed=[seeds[row]], **settings)
        assert alone == [together[row]]
    assert qsun.generate(prefills, decode, prompts, seed=1, **settings) != together


def test_static_and_growing_caches_agree_over_many_columns(tiny_model):
    prefill, decode = pair(tiny_model("gemma2", max_position_embeddings=512))
    prompts = prompts_of((3, 20), seed=4)
    growing, static = (
        qsun.generate(prefill, decode, prompts, max_new_tokens=200, eos=(), static=one) for one in (False, True)
    )
    assert growing == static
    assert [len(answer) for answer in growing] == [200, 200]


def test_one_token_prompts_need_no_prefill(modules, tiny_model):
    prefills, decode = modules
    prompts = [[5], [99]]
    answers = [qsun.generate(prefill, decode, prompts, max_new_tokens=NEW) for prefill in prefills]
    assert answers[0] == answers[1] == answers[2]
    assert answers[0] == qsun.generate(prefills[0], decode, prompts, max_new_tokens=NEW, static=True)


def test_eos_ends_a_row_and_no_other(modules):
    (prefill, *_), decode = modules
    prompts = prompts_of((4, 9, 6), seed=5)
    free = qsun.generate(prefill, decode, prompts, max_new_tokens=NEW, eos=())
    end = free[1][4]
    cut = qsun.generate(prefill, decode, prompts, max_new_tokens=NEW, eos=[end])
    for whole, part in zip(free, cut, strict=True):
        assert part == (whole[: whole.index(end) + 1] if end in whole else whole)


def test_dtypes_may_differ(tiny_model):
    directory = tiny_model("llama", torch.bfloat16)
    decode = qsun.load_decode(directory, dtype="float32", device="cpu")
    prefill = qsun.load_prefill(directory, decode)
    assert prefill.model.dtype == torch.bfloat16
    assert len(qsun.generate(prefill, decode, [[5, 6, 7]], max_new_tokens=3, eos=())[0]) == 3


def test_strings_stop_strings_and_streaming():
    prefill, decode = pair("demo")
    prompts = ["calc 12+7>", "rev abcd>", "json foo ab=cd>"]
    whole = qsun.generate(prefill, decode, prompts, max_new_tokens=40)
    assert whole[:2] == ["19", "dcba"]
    assert whole[2].startswith('{"name":"foo"')
    cut = qsun.generate(prefill, decode, prompts, max_new_tokens=40, stop=["cb", '"foo'])
    assert cut == ["19", "d", '{"name":']
    pieces = list(qsun.generate_stream(prefill, decode, prompts, max_new_tokens=40, stop=["cb", '"foo']))
    assert ["".join(p.text for p in pieces if p.prompt == i) for i in range(3)] == cut
    assert [p.finish for i in range(3) for p in pieces if p.prompt == i and p.finish] == ["eos", "stop", "stop"]
    assert [p.text for p in pieces if p.prompt == 1] == ["d", "", ""]  # "c" may begin the stop string "cb"


def test_an_empty_list():
    prefill, decode = pair("demo")
    assert qsun.generate(prefill, decode, []) == []


@pytest.mark.parametrize(
    ("prompts", "settings", "says"),
    [
        ([[5], []], {}, "prompt 1 is empty"),
        ([[5] * 100], {"max_new_tokens": 30}, "goes over the model's 128 positions; use 29 or less"),
        ([[5] * 129], {"max_new_tokens": 1}, "128 positions; shorten it"),
        ([[5, 128]], {}, "prompt 0 has token 128, outside the model's vocabulary of 128"),
        ("text", {}, "give a list of prompts"),
        (["text"], {}, "has no tokenizer"),
        ([[5]], {"stop": ["x"]}, "has no tokenizer"),
        ([[5]], {"temperatur": 1}, "unknown setting 'temperatur'"),
        ([[5]], {"top_p": 0.0}, "top_p 0.0 is out of range"),
        ([[5]], {"seed": [1, 2]}, "2 seeds for 1 prompts"),
        ([[5]], {"seed": 1 << 63}, "seed 9223372036854775808 is out of range; use less than 9223372036854775808"),
        ([[5]], {"seed": [1 << 64]}, "18446744073709551616 is out of range; use less than 18446744073709551616"),
        ([[5]], {"seed": [-(1 << 63) - 1]}, "-9223372036854775809 is out of range; use -9223372036854775808 or more"),
    ],
)
def test_what_is_refused(prompts, settings, says, tiny_model):
    prefill, decode = pair(tiny_model("llama"))
    with pytest.raises(qsun.QsunError, match=says.replace("(", r"\(")):
        qsun.generate(prefill, decode, prompts, **({"max_new_tokens": 4} | settings))


@pytest.mark.parametrize("seed", [-(1 << 63), (1 << 63) - 1, [0, (1 << 64) - 1]])
def test_the_outermost_seeds_draw(seed, modules):
    prefills, decode = modules
    answers = qsun.generate(prefills[0], decode, [[5, 6], [7, 8]], seed=seed, temperature=2.0, max_new_tokens=3)
    assert all(answers)


def test_a_quantized_module_does_not_prefill(tiny_model, tmp_path):
    qsun.quantize(tiny_model("llama"), tmp_path / "q", qsun.QuantConfig(method="rtn", group_size=32))
    with pytest.raises(qsun.QsunError, match="is quantized; a prefill module is full precision"):
        qsun.load_prefill(tmp_path / "q")
    decode = qsun.load_decode(tmp_path / "q", device="cpu")
    assert qsun.load_prefill(tiny_model("llama"), decode).model.dtype == torch.float32


def test_a_task_that_calibration_left_out_is_warned_of(tiny_model, tmp_path, caplog):
    qsun.quantize(tiny_model("llama"), tmp_path / "q", qsun.QuantConfig(method="rtn", bits=2, group_size=32))
    decode = qsun.load_decode(tmp_path / "q", device="cpu")
    qsun.load_prefill(tiny_model("llama"), decode)
    assert not caplog.records
    made = json.loads((tmp_path / "q" / "qsun.json").read_text())
    made["prefill_modules"] = [{"name": "math", "fingerprint": "0" * 64, "calibration": "math.jsonl"}]
    (tmp_path / "q" / "qsun.json").write_text(json.dumps(made))
    qsun.load_prefill(tiny_model("llama"), decode)
    assert "of 2 bits was calibrated with the KV of math, not of" in caplog.text


def test_the_longest_that_fits(tiny_model):
    prefill, decode = pair(tiny_model("llama"))
    assert len(qsun.generate(prefill, decode, [[5] * 100], max_new_tokens=29, eos=())[0]) == 29


def test_modules_and_prompts_must_match_in_number(modules):
    prefills, decode = modules
    with pytest.raises(qsun.QsunError, match="3 prefill modules for 2 prompts"):
        qsun.generate(prefills, decode, [[5], [6]])


def test_a_wrong_pair_is_refused(tiny_model):
    decode = qsun.load_decode(tiny_model("llama"), device="cpu")
    with pytest.raises(qsun.QsunError, match="intermediate_size is 96 in the prefill module and 128"):
        qsun.load_prefill(tiny_model("llama", intermediate_size=96), decode)
    assert isinstance(qsun.load_prefill(tiny_model("llama", intermediate_size=96)), PrefillModule)


def test_a_module_that_computes_nan_harms_no_other_row(modules, caplog):
    prefills, decode = modules
    poisoned = copy.deepcopy(prefills[0])
    with torch.no_grad():
        poisoned.model.model.layers[0].self_attn.v_proj.weight.fill_(float("nan"))
    prompts = prompts_of((9, 9, 4, 9), seed=6)
    answers = qsun.generate([prefills[0], poisoned, prefills[1], poisoned], decode, prompts, max_new_tokens=NEW)
    assert answers[1] == answers[3] == []
    assert "prompt 1: the model computed NaN or Inf" in caplog.text
    expected = qsun.generate(prefills[:2], decode, [prompts[0], prompts[2]], max_new_tokens=NEW)
    assert [answers[0], answers[2]] == expected


def test_more_prompts_than_the_memory_holds_wait(modules, monkeypatch):
    """Room for 2 rows of 8 in a batch: the others follow."""
    prefills, decode, prompts = mixed(modules, 8)
    expected = qsun.generate(prefills, decode, prompts, max_new_tokens=NEW)
    longest = max(map(len, prompts)) + NEW
    monkeypatch.setattr("qsun.engine.generation.available_bytes", lambda _: 2 * 2 * longest * 2 * 2 * 2 * 16 * 4)
    assert qsun.generate(prefills, decode, prompts, max_new_tokens=NEW) == expected
