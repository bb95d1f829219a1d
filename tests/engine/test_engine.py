"""The engine gives every request what `generate` gives it alone, whatever shares its batch."""

import random

import pytest
import torch

import qsun
from qsun.engine.config import EngineConfig, Sampling
from qsun.engine.engine import Engine
from qsun.engine.requests import Full, Refused, Request
from qsun.errors import QsunError
from tests.engine_rig import NAMES, run_until_idle, tokens_of


def mixed_requests(count, seed=0, longest=120, **sampling):
    """Prompts of one token and up, over all models, with the lengths where blocks and chunks end among them."""
    rng = random.Random(seed)
    lengths = [1, 2, 32, 33, 64, 65] + [rng.randrange(1, longest) for _ in range(count)]
    requests = []
    for i in range(count):
        tokens = tuple(rng.randrange(3, 128) for _ in range(lengths[i]))
        settings = Sampling(max_new_tokens=rng.randrange(1, 40), seed=i, **sampling)
        requests.append(Request(f"r{i}", rng.choice(NAMES), tokens, settings))
    return requests


def alone(request, prefills, decode):
    s = request.sampling
    return qsun.generate(
        prefills[request.model], decode, [list(request.tokens)], max_new_tokens=s.max_new_tokens,
        temperature=s.temperature, top_p=s.top_p, top_k=s.top_k, seed=s.seed, eos=() if s.ignore_eos else None,
    )[0]  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_batch": 3},
        {"prefill_tokens": 16},
        {"prefix_bytes": 0},
        {"partitioned": True},
        {"static": True},
        {"kv_tokens": 400},
    ],
    ids=lambda s: "-".join(map(str, s)) or "default",
)
def test_tokens_are_those_of_generate(make_engine, prefills, decode, settings):
    engine = make_engine(**settings)
    requests = mixed_requests(32, seed=1, ignore_eos=True)
    rng = random.Random(2)
    waiting, updates = list(requests), {}
    while waiting or not engine.idle:
        for _ in range(rng.randrange(3)):  # they arrive while others run
            if waiting:
                engine.submit(waiting.pop())
        for update in engine.step():
            updates.setdefault(update.request, []).append(update)
    for request in requests:
        assert tokens_of(updates[request.id]) == alone(request, prefills, decode), request.id
        assert updates[request.id][-1].finish == "length"


def test_sampled_tokens_are_those_of_generate(make_engine, prefills, decode):
    engine = make_engine()
    requests = mixed_requests(12, seed=3, temperature=0.8, top_p=0.9, top_k=20)
    requests += [Request("greedy", "math", (5, 6, 7)), Request("hot", "math", (5, 6, 7), Sampling(temperature=1.5))]
    for request in requests:
        engine.submit(request)
    updates = run_until_idle(engine)
    for request in requests:
        assert tokens_of(updates[request.id]) == alone(request, prefills, decode), request.id


def test_an_int4_decode_module_serves_too(tmp_path, base_directory, prefills):
    qsun.quantize(base_directory, tmp_path / "int4", qsun.QuantConfig(method="rtn", group_size=32))
    decode = qsun.load_decode(tmp_path / "int4", dtype="float32")
    engine = Engine(decode, EngineConfig(kv_bytes=64 << 20))
    for name, module in prefills.items():
        engine.add_module(name, module)
    requests = mixed_requests(8, seed=4)
    for request in requests:
        engine.submit(request)
    updates = run_until_idle(engine)
    for request in requests:
        assert tokens_of(updates[request.id]) == alone(request, prefills, decode)


@pytest.mark.parametrize("family", ["mistral", "qwen3", "gemma3_text", "phi3", "smollm3"])
def test_families_with_windows_and_masks_of_their_own(tiny_model, family):
    directory = tiny_model(family)
    decode = qsun.load_decode(directory, dtype="float32")
    prefill = qsun.load_prefill(directory, dtype="float32")
    engine = Engine(decode, EngineConfig(kv_bytes=8 << 20, prefill_tokens=5))
    engine.add_module("m", prefill)
    rng = random.Random(5)
    requests = [
        Request(str(n), "m", tuple(rng.randrange(3, 128) for _ in range(n)), Sampling(12, ignore_eos=True))
        for n in (1, 2, 6, 7, 8, 20, 33)
    ]
    for request in requests:
        engine.submit(request)
    updates = run_until_idle(engine)
    for request in requests:
        expected = qsun.generate(prefill, decode, [list(request.tokens)], max_new_tokens=12, eos=())[0]
        assert tokens_of(updates[request.id]) == expected


def test_text_ends_before_a_stop_string_and_says_why(make_engine, prefills, decode):
    engine = make_engine()
    prompt = "Ann has 12 eggs and gets 8 more. How many eggs?>"
    free = qsun.generate(prefills["math"], decode, [prompt], max_new_tokens=24, eos=())[0]
    stop = free[5:8]
    tokens = tuple(engine.tokenizer(prompt)["input_ids"])
    engine.submit(Request("stopped", "math", tokens, Sampling(24, stop=(stop,), ignore_eos=True)))
    stopped = run_until_idle(engine)["stopped"]
    assert "".join(update.text for update in stopped) == free[: free.index(stop)]
    assert stopped[-1].finish == "stop"


def test_the_end_token_ends_unless_it_is_ignored(make_engine, decode):
    engine = make_engine()
    engine.eos = set(range(128))
    engine.submit(Request("ends", "math", (5, 6)))
    engine.submit(Request("goes on", "math", (5, 6), Sampling(4, ignore_eos=True)))
    updates = run_until_idle(engine)
    assert [u.finish for u in updates["ends"]] == ["eos"]
    assert len(updates["goes on"]) == 4


def test_logprobs_are_those_of_the_models_own_distribution(make_engine, prefills, decode):
    engine = make_engine()
    request = Request("a", "code", (7, 8, 9, 10), Sampling(3, temperature=0.7, logprobs=5))
    engine.submit(request)
    engine.submit(Request("b", "math", (7, 8), Sampling(3, logprobs=0)))
    updates = run_until_idle(engine)
    tokens = tokens_of(updates["a"])
    from qsun.runtime.seam import SeamBatch
    from tests.seam_oracle import seam_logits

    rest = torch.tensor([[10, *tokens[:-1]]])
    batch = SeamBatch(torch.tensor([[7, 8, 9]]), rest, rest, torch.zeros(1, dtype=torch.int64))
    with torch.no_grad():
        expected = seam_logits(prefills["code"].model, decode.model, batch)[0].double().log_softmax(-1)
    for place, update in enumerate(updates["a"]):
        (found,) = update.logprobs
        assert found.logprob == pytest.approx(float(expected[place, tokens[place]]), abs=1e-4)
        values, indices = expected[place].topk(5)
        assert [token for token, _ in found.top] == indices.tolist()
        assert [value for _, value in found.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert all(u.logprobs[0].top == () for u in updates["b"])


def test_the_same_prompt_to_two_models_shares_nothing(make_engine, prefills, decode):
    engine = make_engine()
    prompt = tuple(random.Random(6).randrange(3, 128) for _ in range(257))
    answers = {}
    for turn in range(2):  # the second turn finds the first one's prefixes
        for name in NAMES:
            engine.submit(Request(f"{name}{turn}", name, prompt, Sampling(16, ignore_eos=True)))
            updates = run_until_idle(engine)[f"{name}{turn}"]
            assert updates[0].cached_tokens == (256 if turn else 0)
            answers[name, turn] = tokens_of(updates)
    for name in NAMES:
        expected = qsun.generate(prefills[name], decode, [list(prompt)], max_new_tokens=16, eos=())[0]
        assert answers[name, 0] == answers[name, 1] == expected
    assert len({tuple(answers[name, 0]) for name in NAMES}) == 3


def test_a_module_that_is_loaded_again_under_its_name_finds_no_old_prefix(make_engine, prefills, decode):
    engine = make_engine()
    prompt = tuple(range(3, 100))
    engine.submit(Request("old", "math", prompt, Sampling(8)))
    run_until_idle(engine)
    engine.remove_module("math")
    engine.add_module("math", prefills["code"])
    engine.submit(Request("new", "math", prompt, Sampling(8, ignore_eos=True)))
    updates = run_until_idle(engine)["new"]
    assert updates[0].cached_tokens == 0
    assert tokens_of(updates) == qsun.generate(prefills["code"], decode, [list(prompt)], max_new_tokens=8, eos=())[0]


def test_a_model_that_is_removed_finishes_what_it_has(make_engine):
    engine = make_engine()
    engine.submit(Request("a", "math", (5, 6), Sampling(5, ignore_eos=True)))
    engine.step()
    engine.remove_module("math")
    with pytest.raises(Refused, match="being removed"):
        engine.submit(Request("b", "math", (5, 6)))
    assert "math" in engine.state.models
    assert len(tokens_of(run_until_idle(engine)["a"])) == 4
    assert "math" not in engine.state.models
    with pytest.raises(Refused, match="models are code, tool"):
        engine.submit(Request("c", "math", (5, 6)))


def test_cancelling_frees_the_slot_wherever_the_request_is(make_engine, prefills, decode):
    engine = make_engine(max_batch=2, prefill_tokens=8)
    requests = [Request(n, "math", tuple(range(3, 43)), Sampling(20, ignore_eos=True)) for n in ("a", "b", "c", "d")]
    for request in requests:
        engine.submit(request)
    engine.step()
    state = engine.state.models["math"]
    assert (state.prefilling, state.waiting) == (2, 2)
    engine.cancel("a")  # prefilling
    engine.cancel("d")  # waiting
    engine.cancel("nobody")
    while engine.state.models["math"].decoding < 2:
        engine.step()
    engine.cancel("b")  # decoding
    rest = run_until_idle(engine)
    assert set(rest) == {"c"}
    engine.submit(Request("e", "math", tuple(range(3, 43)), Sampling(20, ignore_eos=True)))
    whole = run_until_idle(engine)["e"]
    assert tokens_of(whole) == alone(requests[0], prefills, decode)
    assert engine.state.models["math"].kv_tokens == 0


def test_a_request_that_takes_too_long_ends_with_an_error(make_engine):
    engine = make_engine()
    engine.submit(Request("late", "math", (5, 6), Sampling(400, ignore_eos=True), seconds=0.0))
    engine.submit(Request("fine", "math", (5, 6), Sampling(2, ignore_eos=True)))
    updates = run_until_idle(engine)
    assert [u.finish for u in updates["late"]] == ["timeout"]
    assert updates["fine"][-1].finish == "length"


def test_what_can_never_be_served_is_refused_before_it_waits(make_engine):
    engine = make_engine(max_waiting=1, kv_tokens=256)
    with pytest.raises(QsunError, match="the prompt is empty"):
        engine.submit(Request("a", "math", ()))
    with pytest.raises(QsunError, match="token 128, outside"):
        engine.submit(Request("a", "math", (5, 128)))
    with pytest.raises(QsunError, match="512 positions"):
        engine.submit(Request("a", "math", (5,), Sampling(600)))
    with pytest.raises(QsunError, match="need KV of 400 tokens, and the engine has 256"):
        engine.submit(Request("a", "math", (5,), Sampling(400)))
    with pytest.raises(Refused, match="'poetry' is not served; models are math, code, tool"):
        engine.submit(Request("a", "poetry", (5,)))
    engine.submit(Request("a", "math", (5,)))
    with pytest.raises(Full, match="1 requests are waiting"):
        engine.submit(Request("b", "math", (5,)))
    engine.cancel("a")
    engine.submit(Request("b", "math", (5,)))


def test_a_model_that_computes_nan_fails_its_own_request_only(make_engine, prefills):
    engine = make_engine()
    poisoned = qsun.PrefillModule(_poisoned(prefills["math"].model), prefills["math"].directory)
    engine.add_module("poisoned", poisoned)
    engine.submit(Request("bad", "poisoned", (5, 6, 7)))
    engine.submit(Request("good", "math", (5, 6, 7), Sampling(4, ignore_eos=True)))
    updates = run_until_idle(engine)
    assert [u.finish for u in updates["bad"]] == ["error"]
    assert "NaN" in updates["bad"][0].error
    assert len(tokens_of(updates["good"])) == 4


@pytest.mark.parametrize("beside", [True, False], ids=["beside others", "before others"])
def test_a_row_that_held_nan_is_clean_for_the_next(make_engine, prefills, beside):
    """Masked columns are multiplied too, and 0 x NaN is NaN: a shorter row in that place must not see them."""
    engine, twin = make_engine(), make_engine()
    engine.add_module("poisoned", qsun.PrefillModule(_poisoned(prefills["math"].model), prefills["math"].directory))
    long = Request("long", "math", tuple(range(3, 70)), Sampling(20, ignore_eos=True))
    bad = Request("bad", "poisoned", tuple(range(3, 43)))
    short = Request("short", "code", (5, 6, 7), Sampling(8, ignore_eos=True))
    together, after = ([long, bad, short], []) if beside else ([bad], [short, long])
    for request in together:
        engine.submit(request)
    updates = run_until_idle(engine)
    for request in after:
        engine.submit(request)
    updates |= run_until_idle(engine)
    for request in (long, short):
        twin.submit(request)
    expected = run_until_idle(twin)
    assert [u.finish for u in updates["bad"]] == ["error"]
    assert tokens_of(updates["short"]) == tokens_of(expected["short"])
    assert tokens_of(updates["long"]) == tokens_of(expected["long"])


def _poisoned(model):
    import copy

    model = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.fill_(float("nan"))
    return model


def test_a_long_prompt_does_not_hold_up_the_rows_that_decode(make_engine):
    engine = make_engine(prefill_tokens=16)
    engine.submit(Request("talks", "math", (5, 6), Sampling(40, ignore_eos=True)))
    engine.step()
    engine.submit(Request("long", "code", tuple(range(3, 103)) * 4, Sampling(2, ignore_eos=True)))
    engine.submit(Request("short", "tool", (5, 6, 7), Sampling(2, ignore_eos=True)))
    order = []
    while not engine.idle:
        updates = engine.step()
        assert "talks" in {u.request for u in updates} or order.count("talks") >= 39
        order += [u.request for u in updates]
    assert order.index("short") < order.index("long")  # a turn for each, not the whole of one
    assert order.index("long") > 20  # 399 tokens in turns of 16


def test_a_burst_of_one_model_does_not_starve_another(make_engine):
    engine = make_engine(max_batch=2)
    for i in range(20):
        engine.submit(Request(f"burst{i}", "math", (5, 6, 7), Sampling(8, ignore_eos=True)))
    engine.step()
    engine.submit(Request("one", "code", (5, 6, 7), Sampling(8, ignore_eos=True)))
    ended = []
    while not engine.idle:
        ended += [update.request for update in engine.step() if update.finish]
    assert ended.index("one") <= 3  # the two that ran, and it is next
