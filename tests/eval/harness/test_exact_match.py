"""Scores of generated answers, and how long an answer may be."""

import types

import pytest

from qsun.data.examples import TokenExample
from qsun.engine.generation import generate
from qsun.errors import QsunError
from qsun.eval.harness.exact_match import answer_limits, score_examples
from qsun.runtime.decode_module import load_decode
from qsun.runtime.prefill_module import PrefillModule

POSITIONS = 64  # of the short model


def example(prompt, response):
    return TokenExample((5,) * prompt, (6,) * response)


def config(**changes):
    return types.SimpleNamespace(max_position_embeddings=POSITIONS, **changes)


def test_answers_are_a_quarter_longer_than_the_longest_response_as_far_as_positions_reach():
    assert answer_limits([example(4, 8), example(50, 3)], config()) == [11, 11]
    assert answer_limits([example(4, 40), example(30, 3), example(45, 3)], config()) == [51, 35, 20]
    with pytest.raises(QsunError, match=r"prompt of 60 tokens and a response of 6, and behind that prompt .* write 5"):
        answer_limits([example(4, 8), example(60, 6)], config())


def test_answers_end_where_rope_changes():
    longrope = config(rope_parameters={"rope_type": "longrope", "original_max_position_embeddings": 32})
    assert answer_limits([example(4, 20), example(30, 3), example(40, 3)], longrope) == [26, 3, 25]
    with pytest.raises(QsunError, match="can write 3; leave it out"):
        answer_limits([example(4, 8), example(30, 4)], longrope)


@pytest.fixture(scope="module")
def pair(tiny_model, demo_tokenizer, tmp_path_factory):
    directory = tiny_model("llama", max_position_embeddings=POSITIONS)
    decode = load_decode(directory, "cpu", "float32")
    named = tmp_path_factory.mktemp("named")
    demo_tokenizer.save_pretrained(named)
    return PrefillModule(decode.model, named, decode.manifest), decode


def test_a_long_prompt_and_a_long_response_of_other_rows_are_scored(pair, demo_tokenizer):
    prefill, decode = pair
    examples = [example(3, 40), example(40, 3), example(4, 2), example(46, 2)]
    limits = answer_limits(examples, decode.model.config)
    wanted = [generate(prefill, decode, [list(e.prompt)], max_new_tokens=n)[0] for e, n in zip(examples, limits)]  # noqa: B905
    seen = []
    score = score_examples(examples, lambda answer, _: seen.append(answer) or len(seen) % 2 == 0, prefill, decode)
    assert seen == demo_tokenizer.batch_decode(wanted, skip_special_tokens=True)
    assert score.right == (False, True, False, True) and score.rate == 0.5
