"""Training examples, and how they are laid out on both sides of the seam."""

import random
from itertools import pairwise, product

import pytest
import torch

import qsun
from qsun.data.examples import TokenExample
from qsun.errors import QsunError
from qsun.runtime.seam import IGNORED, collate
from qsun.tuning.examples import (
    Batches,
    crosses,
    cut_by_length,
    draw,
    fingerprint,
    hold_out,
    pieces,
    read_examples,
)
from tests.seam_oracle import seam_logits
from tests.tiny_models import write_jsonl


@pytest.fixture
def read(tmp_path, demo_tokenizer):
    def run(*rows, max_len=100, tokenizer=demo_tokenizer, **options):
        return read_examples([str(write_jsonl(tmp_path / "rows.jsonl", list(rows)))], tokenizer, max_len, **options)

    return run


def test_prompt_and_response(read, demo_tokenizer):
    (example,), _ = read({"prompt": "calc 1+2>", "response": "3"})
    assert demo_tokenizer.decode(example.prompt) == "<s>calc 1+2>"
    assert demo_tokenizer.decode(example.response) == "3</s>"


def test_a_prompt_that_spells_its_first_token_gets_no_second(read):
    (spelt,), _ = read({"prompt": "<s>ab>", "response": "c"})
    (plain,), _ = read({"prompt": "ab>", "response": "c"})
    assert spelt == plain


def test_every_assistant_turn_of_a_chat_is_an_example(read, demo_tokenizer):
    turns = [("user", "rev ab"), ("assistant", "ba"), ("user", "up x"), ("assistant", "X")]
    (first, second), _ = read({"messages": [{"role": role, "content": text} for role, text in turns]})
    assert demo_tokenizer.decode(first.prompt) == "<s>rev ab>"
    assert demo_tokenizer.decode(first.response) == "ba</s>"
    assert demo_tokenizer.decode(second.prompt) == "<s>rev ab>ba</s><s>up x>"
    assert demo_tokenizer.decode(second.response) == "X</s>"


def with_template(tokenizer, template):
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


@pytest.mark.parametrize(
    "empty",
    [
        {"prompt": "a", "response": ""},
        *(
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}]}
            for content in ("", " \n", None, [], [{"type": "text", "text": ""}])
        ),
    ],
)
def test_rows_with_an_empty_answer_are_left_out_and_counted(empty, read, caplog):
    """They would teach the module to stop at once."""
    examples, _ = read(empty, {"prompt": "a", "response": "b"})
    assert len(examples) == 1
    assert "left out 1 rows; the first: training file" in caplog.text and "has no " in caplog.text


def test_empty_turns_of_a_chat_are_no_answers(read):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", ""), ("user", "d"), ("assistant", "e")]
    chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
    assert len(read(chat, {"prompt": "a", "response": "b"})[0]) == 3


def test_what_a_template_puts_behind_the_end_is_no_answer(read, demo_tokenizer):
    template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (example,), _ = read(chat, tokenizer=with_template(demo_tokenizer, template))
    assert demo_tokenizer.decode(example.prompt) == "[user]a[assistant]"
    assert demo_tokenizer.decode(example.response) == "b</s>"


def test_long_examples_are_left_out_and_counted(read):
    rows = [{"prompt": "a" * n, "response": "b"} for n in (3, 7, 8, 20)]
    examples, too_long = read(*rows, max_len=10)  # with <s>, the response and </s>
    assert [len(example.prompt) for example in examples] == [4, 8]
    assert too_long == 2


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({}, "line 1: needs 'messages', or 'prompt' and 'response', or (for calibration) 'text'; it has nothing"),
        ({"text": "a"}, "it has text"),
        ({"text": "a", "response": "b"}, "line 1: needs 'messages', or 'prompt' and 'response'; it has text, response"),
        ({"prompt": 3, "response": "a"}, "'prompt' is 3, not text"),
        (
            {"prompt": "a\ud83d", "response": "a"},
            r"rows.jsonl, line 1: '\ud83d' is half of a surrogate pair, not a character",
        ),
        ({"prompt": "a", "response": "\ude00"}, "is half of a surrogate pair"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\ud83db"}]},
            "is half of a surrogate pair",
        ),
        ({"messages": "hello"}, "'messages' is not a list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "need an assistant turn after a prompt"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "need an assistant turn after a prompt"),
        (
            {"messages": [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "chat template refuses these messages",
        ),
        ({"prompt": "a" * 200, "response": "b"}, "has no examples: all 1 are longer than max_len 100"),
    ],
)
def test_rows_that_cannot_be_used(row, says, read):
    with pytest.raises(QsunError) as caught:
        read(row)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("row", [{"text": "a"}, {"text": "a", "response": "b"}, {"text": "a", "response": None}])
def test_text_is_no_prompt_for_a_teacher_to_answer(row, read):
    with pytest.raises(QsunError, match="line 1: needs 'messages', or 'prompt' and 'response'; it has text"):
        read(row, needs_response=False)


def test_a_template_that_rewrites_the_prompt(read, demo_tokenizer):
    template = "{% if add_generation_prompt %}x{% else %}y{% endif %}"
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(QsunError, match="give 'prompt' and 'response' instead"):
        read(chat, tokenizer=with_template(demo_tokenizer, template))


def test_both_sides_of_the_seam():
    batch = collate([TokenExample((5, 6, 7), (8, 9)), TokenExample((4,), (3, 2, 1)), TokenExample((1, 2), (9,))])
    assert batch.prefix.tolist() == [[5, 6], [0, 0], [0, 1]]
    assert batch.starts.tolist() == [0, 2, 1]
    assert batch.rest.tolist() == [[7, 8, 0], [4, 3, 2], [2, 0, 0]]
    assert batch.labels.tolist() == [[8, 9, IGNORED], [3, 2, 1], [9, IGNORED, IGNORED]]


def test_only_one_token_prompts_have_an_empty_prefix():
    batch = collate([TokenExample((5,), (6,)), TokenExample((7,), (8, 9))])
    assert batch.prefix.shape == (2, 0)
    assert torch.equal(batch.starts, torch.zeros(2, dtype=torch.int64))


def test_held_out_prompts_are_not_trained_on():
    r = random.Random(0)
    examples = [TokenExample((r.randrange(40),), (n,)) for n in range(300)]
    train, valid = hold_out(examples, 0.1, seed=4)
    assert not {e.prompt for e in train} & {e.prompt for e in valid}
    assert sorted([*train, *valid], key=lambda e: e.response) == examples
    assert len({e.prompt for e in valid}) == 4
    assert hold_out(examples, 0.1, seed=4) == (train, valid)
    assert hold_out(examples, 0.1, seed=5) != (train, valid)


def test_validation_examples_are_drawn_by_the_seed():
    examples = [TokenExample((n,), (n,)) for n in range(40)]
    drawn = draw(examples, 7, seed=1)
    assert drawn == sorted(drawn, key=lambda e: e.prompt)
    assert len({e.prompt for e in drawn}) == 7
    assert draw(examples, 7, seed=1) == drawn != draw(examples, 7, seed=2)
    assert draw(examples, 0, seed=1) == draw(examples, 40, seed=1) == examples


def test_too_few_to_hold_out():
    with pytest.raises(QsunError, match="1 different prompts are too few to hold 5% of them out; give validation data"):
        hold_out([TokenExample((1,), (2,))] * 9, 0.05, seed=0)


def of_lengths(count, seed=0):
    """Examples of different lengths, all of them different."""
    r = random.Random(seed)
    return [TokenExample((i, *[5] * r.randrange(60)), (6,) * r.randrange(1, 20)) for i in range(count)]


def by_prompt(examples):
    return sorted(examples, key=lambda e: e.prompt)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize(("count", "size"), [(50, 8), (700, 4), (3, 8), (16, 16)])
def test_an_epoch_has_every_example_once(count, size, grouped):
    examples, steps = of_lengths(count), -(-count // size)
    batches = Batches(examples, size, 3, grouped)
    epochs = [[batches.of_step(epoch * steps + step) for step in range(steps)] for epoch in range(2)]
    for epoch in epochs:
        assert by_prompt(e for batch in epoch for e in batch) == by_prompt(examples)
        assert sorted(map(len, epoch), reverse=True)[:-1] == [size] * (steps - 1)
    assert epochs[0] != epochs[1] or count <= size


def test_a_batch_needs_no_state():
    """A resumed run begins in the middle."""
    examples = of_lengths(50)
    batches = Batches(examples, 8, 3, grouped=True)
    expected = [batches.of_step(step) for step in range(20)]
    assert [Batches(examples, 8, 3, grouped=True).of_step(step) for step in (19, 2, 11)] == [
        expected[s] for s in (19, 2, 11)
    ]
    assert [Batches(examples, 8, 4).of_step(step) for step in range(20)] != expected


def test_examples_of_like_length_come_together():
    examples = of_lengths(2000)

    def padded(grouped):
        batches = Batches(examples, 16, 0, grouped)
        return sum(collate(batches.of_step(step)).prefix.numel() for step in range(2000 // 16))

    real = sum(len(e.prompt) - 1 for e in examples)
    assert padded(grouped=False) > 1.7 * real
    assert padded(grouped=True) < 1.35 * real
    first = [len(Batches(examples, 16, seed, grouped=True).of_step(0)[0].prompt) for seed in range(20)]
    assert max(first) - min(first) > 30  # batches are not in the order of their lengths


def computed(passes):
    return sum(collate(p).prefix.numel() + collate(p).rest.numel() + 64 for p in passes)


@pytest.mark.parametrize("seed", range(5))
def test_passes_compute_the_least(seed):
    """Oracle: every way to cut what is sorted by length."""
    examples = of_lengths(8, seed)
    passes = cut_by_length(examples)
    assert by_prompt(e for p in passes for e in p) == by_prompt(examples)
    ranked = sorted(examples, key=lambda e: len(e.prompt) + len(e.response))
    ways = []
    for cuts in product([0, 1], repeat=7):
        places = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), 8]
        ways.append(computed([ranked[a:b] for a, b in pairwise(places)]))
    assert computed(passes) == min(ways) < ways[0]


def test_many_examples_and_none_are_not_cut():
    assert cut_by_length([]) == []
    assert len(cut_by_length(of_lengths(300))) == 1


@pytest.mark.parametrize("count", [1, 5, 16, 17])
@pytest.mark.parametrize(("shares", "cuts"), [(1, 1), (1, 4), (2, 1), (3, 2), (4, 9)])
def test_shares_and_pieces_hold_each_example_once(count, shares, cuts):
    examples = of_lengths(count)
    found = [list(pieces(examples, share, shares, cuts)) for share in range(shares)]
    assert by_prompt(e for share in found for piece in share for e in piece) == by_prompt(examples)
    assert len({len(share) for share in found}) == 1


def test_the_fingerprint_sees_order_and_the_seam():
    a, b = TokenExample((1, 2), (3,)), TokenExample((1,), (2, 3))
    assert len({fingerprint(rows) for rows in ([a], [b], [a, b], [b, a])}) == 4


@pytest.mark.parametrize(
    ("prompt", "response", "crossing"),
    [
        (5, 4, False),
        (5, 5, True),
        (8, 0, False),
        (9, 0, True),
        (9, 1, True),
        (10, 0, False),
        (10, 1, False),
        (20, 9, False),
    ],
)
def test_examples_that_cross_the_boundary_of_rope(prompt, response, crossing):
    """Of a prompt of n tokens, n - 1 are prefilled; the last response token is never an input."""
    example = TokenExample((3,) * prompt, (4,) * response)
    assert crosses(example, 8) == crossing
    assert not crosses(example, None)


def test_a_row_is_computed_as_it_is_alone_beside_a_long_one(tiny_model):
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 8, "long_factor": [1.0 + 4 * i for i in range(8)],
    }  # fmt: skip
    directory = tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=32)
    model = qsun.load_decode(directory, "cpu", torch.float32).model
    r = random.Random(0)
    short, long = (TokenExample(tuple(r.randrange(3, 128) for _ in range(n)), (5, 2)) for n in (10, 50))
    with torch.no_grad():
        alone, mixed = (seam_logits(model, model, collate(rows))[0] for rows in ([short], [short, long]))
    torch.testing.assert_close(alone, mixed, rtol=1e-4, atol=1e-4)
