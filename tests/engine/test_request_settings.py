"""What a request's settings do to its tokens in a batch of others, and the log-probabilities of its prompt."""

import random

import pytest
import torch

from qsun.engine.config import Sampling
from qsun.engine.requests import Request
from qsun.errors import QsunError
from tests.engine_rig import run_until_idle, tokens_of
from tests.seam_oracle import seam_reference


def answers(engine, *requests):
    """Updates by request, of a batch that has an undisturbed row beside them."""
    beside = Request("beside", "tool", (9, 8, 7), Sampling(max_new_tokens=12, ignore_eos=True))
    engine.submit(beside, *requests)
    return run_until_idle(engine)


def request(name, **sampling):
    return Request(name, "math", (5, 6, 7), Sampling(**({"max_new_tokens": 12, "ignore_eos": True} | sampling)))


@pytest.fixture
def free(make_engine):
    """The tokens of `request` without settings, and those of the row beside it."""
    found = answers(make_engine(), request("a"))
    return tokens_of(found["a"]), tokens_of(found["beside"])


def test_a_bias_forbids_and_forces_and_leaves_other_rows_alone(make_engine, free):
    tokens, beside = free
    biases = {"forbids": {tokens[0]: -100.0}, "forces": {42: 1000.0}}
    found = answers(make_engine(), *(request(name, logit_bias=bias) for name, bias in biases.items()))
    assert tokens[0] not in tokens_of(found["forbids"])
    assert tokens_of(found["forces"]) == [42] * 12
    assert tokens_of(found["beside"]) == beside


def test_penalties_follow_the_answer(make_engine, free):
    """A frequency penalty that grows beyond any logit: no token comes twice until all have come."""
    found = answers(make_engine(), request("a", frequency_penalty=100.0), request("b", repetition_penalty=50.0))
    assert len(set(tokens_of(found["a"]))) == 12
    assert tokens_of(found["a"])[0] == free[0][0]
    assert tokens_of(found["b"]) != free[0]


def test_a_stop_token_ends_with_stop_and_is_no_text(make_engine, free):
    tokens, _ = free
    place = next(i for i in range(1, 12) if tokens[i] not in tokens[:i])
    found = answers(make_engine(), request("a", stop_token_ids=(tokens[place],)), request("b"))
    assert tokens_of(found["a"]) == tokens[: place + 1]
    assert found["a"][-1].finish == "stop"
    whole = "".join(update.text for update in found["b"])
    assert whole.startswith("".join(update.text for update in found["a"]))


def test_nothing_ends_an_answer_before_its_least_tokens(make_engine, free):
    engine = make_engine()
    tokens, _ = free
    engine.eos = {tokens[1], tokens[2]}
    stop = engine.tokenizer.decode([tokens[0]])
    eos, stops, ids = (
        {"ignore_eos": False},
        {"stop": (stop,)},
        {"stop_token_ids": (tokens[0],)},
    )
    for least in (0, 5):
        found = answers(
            engine,
            *(request(str(n), **s, min_new_tokens=least) for n, s in enumerate((eos, stops, ids))),
        )
        lengths = [len(tokens_of(found[str(n)])) for n in range(3)]
        assert all(length >= max(least, 1) for length in lengths)
        if not least:
            assert lengths == [2, 1, 1]
    assert tokens_of(found["1"])[:5] == tokens[:5]  # a stop string does not change the tokens, an end token is masked
    assert not engine.eos & set(tokens_of(found["0"])[:5])


class Script:
    """Allows one token at a time; fails at the end."""

    def __init__(self, tokens):
        self.tokens = list(tokens)

    def mask(self, logits):
        allowed = logits[self.tokens[0]].item()
        logits.fill_(float("-inf"))
        logits[self.tokens[0]] = allowed

    def advance(self, token):
        assert token == self.tokens.pop(0)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_constraint_decides_and_its_failure_is_its_requests_only(make_engine, free, temperature):
    script = [10, 20, 30, 40]
    asked = [
        request("kept", max_new_tokens=4, temperature=temperature, constraint=Script(script)),
        request("fails", temperature=temperature, constraint=Script(script)),
    ]
    found = answers(make_engine(), *asked)
    assert tokens_of(found["kept"]) == tokens_of(found["fails"]) == script
    assert found["fails"][-1].finish == "error"
    assert "IndexError" in found["fails"][-1].error
    assert tokens_of(found["beside"]) == free[1]


def test_a_constraint_that_allows_nothing_is_an_error(make_engine):
    class Nothing(Script):
        def mask(self, logits):
            logits.fill_(float("-inf"))

    found = answers(make_engine(), request("a", constraint=Nothing([])))
    assert found["a"][-1].error == "the request's settings allow no token here"


def doubled(model):
    return {name: tensor.double() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("settings", [{}, {"prefill_tokens": 7}, {"pass_tokens": 5}], ids=str)
def test_prompt_logprobs_are_those_of_the_seam_for_every_beginning(make_engine, prefills, decode, settings):
    engine = make_engine(**settings)
    rng = random.Random(8)
    prompts = [[rng.randrange(3, 128) for _ in range(length)] for length in (1, 2, 13, 33, 40, 65)]
    for turn in range(2):  # the second time with prefixes from the cache
        engine.submit(
            *(
                Request(str(n), "code", tuple(prompt), Sampling(max_new_tokens=n % 3, prompt_logprobs=3))
                for n, prompt in enumerate(prompts)
            )
        )
        updates = run_until_idle(engine)
        config, weights = decode.model.config, (doubled(prefills["code"].model), doubled(decode.model))
        for number, prompt in enumerate(prompts):
            first, *others = updates[str(number)]
            assert not any(update.prompt_logprobs for update in others)
            assert (first.cached_tokens > 0) == (turn > 0 and len(prompt) > 32)
            assert [score.token for score in first.prompt_logprobs] == prompt[1:]
            assert len(tokens_of(updates[str(number)])) == number % 3
            for place, score in enumerate(first.prompt_logprobs, 1):
                expected = seam_reference(*weights, config, prompt[:place], place)[-1].log_softmax(-1)
                assert score.logprob == pytest.approx(float(expected[prompt[place]]), abs=1e-4)
                assert [token for token, _ in score.top] == expected.topk(3).indices.tolist()


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "phi3"])
def test_prompt_logprobs_of_every_kind_of_mask(tiny_model, family):
    """One weight on both sides: what the model itself says of the text, beyond its sliding window too."""
    import qsun
    from qsun.engine.config import EngineConfig
    from qsun.engine.engine import Engine
    from tests.tiny_models import reference

    directory = tiny_model(family)
    decode = qsun.load_decode(directory, dtype="float32")
    engine = Engine(decode, EngineConfig(kv_bytes=8 << 20, prefill_tokens=9))
    engine.add_module("m", qsun.load_prefill(directory, dtype="float32"))
    prompt = [random.Random(9).randrange(3, 128) for _ in range(30)]
    engine.submit(Request("a", "m", tuple(prompt), Sampling(max_new_tokens=0, prompt_logprobs=0)))
    (update,) = run_until_idle(engine)["a"]
    with torch.no_grad():
        expected = reference(directory)(torch.tensor([prompt])).logits[0].double().log_softmax(-1)
    for place, score in enumerate(update.prompt_logprobs):
        assert score.logprob == pytest.approx(float(expected[place, prompt[place + 1]]), abs=1e-4)
    assert update.finish == "length"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0 is out of range; use 1 or more, or 0 with prompt_logprobs"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens 9 is over max_new_tokens 8"),
        ({"min_p": 1.5}, "min_p 1.5 is out of range"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0 is out of range"),
        ({"logit_bias": {128: 1.0}}, "logit_bias has token 128, outside the model's vocabulary of 128"),
        ({"stop_token_ids": (500,)}, "stop_token_ids has token 500, outside"),
        ({"prompt_logprobs": 21}, "prompt_logprobs 21 is out of range"),
    ],
)
def test_what_is_refused(make_engine, settings, says):
    with pytest.raises(QsunError, match=says):
        make_engine().submit(Request("a", "math", (5,), Sampling(**settings)))
