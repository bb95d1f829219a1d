"""Calibration data: every kind of source, which positions a decode module sees, and what is refused."""

import json
import pickle
import random
import re
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from qsun.data import calibration, sources
from qsun.data.calibration import BUILTIN, Sample, builtin_text, read_calibration
from qsun.errors import QsunError
from tests.tiny_models import VOCAB, random_tokens, write_jsonl

BOS, EOS = 1, 2
CPU = torch.device("cpu")
EXACT = {"rtol": 1e-5, "atol": 2e-5}


@pytest.fixture
def read(demo_tokenizer):
    def read(*sources, samples=1000, seq_len=64, seed=0, tokenizer=demo_tokenizer):
        return read_calibration([str(s) for s in sources], tokenizer, VOCAB, samples, seq_len, seed)

    return read


def ids(text: str) -> tuple[int, ...]:
    """The demo tokenizer's tokens are characters."""
    return tuple(map(ord, text))


# --- kinds of sources


def test_text_becomes_windows_that_all_count(read, tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("0123456789abcdef")
    found = read(path, seq_len=5)
    assert found.samples == tuple(Sample((BOS, *ids(s))) for s in ("0123", "4567", "89ab", "cdef"))
    assert found.decode_tokens == 20
    assert found.source == str(path) and found.preview == "<s>0123"


def test_text_that_spells_its_first_special_token_gets_no_second_one(read, tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("<s>abc")
    assert read(path, seq_len=4).samples == (Sample((BOS, *ids("abc"))),)


def test_jsonl_texts_are_joined_into_windows(read, tmp_path):
    path = write_jsonl(tmp_path / "some.jsonl", [{"text": "abc"}, {"text": "defgh"}])
    assert read(path, seq_len=5).samples == (Sample((BOS, *ids("abc"), BOS)), Sample((BOS, *ids("defg"))))


@pytest.mark.parametrize("more", [{"response": "x"}, {"prompt": "p"}, {"question": "q", "response": "x"}])
def test_text_beside_half_a_pair_is_read_as_text(more, read, tmp_path):
    path = write_jsonl(tmp_path / "some.jsonl", [{"text": "abcd", **more}])
    assert read(path, seq_len=5).samples == (Sample((BOS, *ids("abcd"))),)


def test_windows_of_a_tokenizer_without_bos_are_the_text(read, demo_tokenizer, tmp_path):
    class Plain:
        bos_token, bos_token_id = demo_tokenizer.bos_token, demo_tokenizer.bos_token_id  # it has one and adds none
        decode = demo_tokenizer.decode

        def __call__(self, text, **_):
            return demo_tokenizer(text, add_special_tokens=False)

    path = tmp_path / "some.txt"
    path.write_text("0123456789")
    assert read(path, seq_len=5, tokenizer=Plain()).samples == (Sample(ids("01234")), Sample(ids("56789")))


def test_prompt_and_response_are_split_at_the_seam(read, tmp_path):
    """Decode's first input is the last prompt token; the last response token (end of sequence) is never an input."""
    path = write_jsonl(tmp_path / "some.jsonl", [{"prompt": "abc", "response": "xyz"}])
    found = read(path)
    assert found.samples == (Sample((BOS, *ids("abc"), *ids("xyz")), prefill_tokens=3),)
    (sample,) = found.samples
    assert sample.tokens[sample.prefill_tokens] == ord("c"), "decode is fed the last token of the prompt"
    assert sample.tokens[-1] == ord("z"), "the end of sequence is produced, never fed"
    assert found.decode_tokens == 4


def test_chat_messages_are_rendered_by_the_models_template(read, tmp_path):
    messages = [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "cd"},
        {"role": "user", "content": "ef"},
        {"role": "assistant", "content": "gh"},
    ]
    path = write_jsonl(tmp_path / "some.jsonl", [{"messages": messages}, {"messages": messages[:2]}])
    prompt = (BOS, *ids("ab>cd"), EOS, BOS, *ids("ef>"))
    assert read(path).samples == (
        Sample((*prompt, *ids("gh")), prefill_tokens=len(prompt) - 1),
        Sample((BOS, *ids("ab>cd")), prefill_tokens=3),
    )


def test_what_follows_the_last_assistant_turn_is_left_out(read, tmp_path):
    messages = [{"role": r, "content": c} for r, c in (("user", "ab"), ("assistant", "cd"), ("user", "ef"))]
    path = write_jsonl(tmp_path / "some.jsonl", [{"messages": messages}])
    assert read(path).samples == (Sample((BOS, *ids("ab>cd")), prefill_tokens=3),)


def test_a_prompt_of_one_token_leaves_prefill_nothing(read, tmp_path):
    path = write_jsonl(tmp_path / "some.jsonl", [{"prompt": "", "response": "xy"}])
    assert read(path).samples == (Sample((BOS, *ids("xy")), prefill_tokens=0),)


def test_responses_are_cut_at_seq_len(read, tmp_path):
    path = write_jsonl(tmp_path / "some.jsonl", [{"prompt": "abc", "response": "uvwxyz"}])
    assert read(path, seq_len=5).samples == (Sample((BOS, *ids("abcu")), prefill_tokens=3),)
    with pytest.raises(QsunError, match=r"line 1: the prompt of 4 tokens leaves no response within --seq-len 3"):
        read(path, seq_len=3)


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint16"])
def test_npy_rows_are_token_ids_as_they_are(dtype, read, tmp_path):
    rows = random_tokens(3, 9)
    np.save(tmp_path / "some.npy", rows.astype(dtype))
    found = read(tmp_path / "some.npy", seq_len=7, tokenizer=None)
    assert found.samples == tuple(Sample(tuple(row[:7])) for row in rows.tolist())
    assert all(type(token) is int for token in found.samples[0].tokens)


def test_a_data_set_folder(read, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"prompt": "abc", "response": "xyz"}, {"prompt": "de", "response": "f"}])
    expected = (Sample((BOS, *ids("abcxyz")), prefill_tokens=3), Sample((BOS, *ids("def")), prefill_tokens=2))
    assert read(folder).samples == expected
    assert read(f"{folder}:train").samples == expected


def test_the_packaged_text(read):
    found = read(BUILTIN, samples=4, seq_len=32)
    assert len(found.samples) == 4
    assert all(len(s.tokens) == 32 and s.prefill_tokens == 0 for s in found.samples)
    text = builtin_text().read_bytes().decode().encode("ascii", "replace").decode()
    assert found.preview.startswith("<s>") and found.preview.removeprefix("<s>") in text


def test_several_sources_get_equal_shares(read, tmp_path):
    names = []
    for letter in "abc":
        names.append(
            write_jsonl(tmp_path / f"{letter}.jsonl", [{"prompt": letter, "response": "xyz"[:i]} for i in (1, 2, 3)])
        )
    drawn = read(*names, samples=5)
    assert [chr(s.tokens[1]) for s in drawn.samples] == [*"aabbc"]
    assert drawn.source == ", ".join(map(str, names))


# --- the draw


def test_the_same_seed_draws_the_same_samples(read, tmp_path):
    np.save(tmp_path / "some.npy", random_tokens(50, 6))
    first, second, other = (read(tmp_path / "some.npy", samples=10, seed=seed) for seed in (3, 3, 4))
    assert first == second and first.fingerprint == second.fingerprint
    assert first.samples != other.samples and first.fingerprint != other.fingerprint
    assert len(set(first.samples)) == 10


@pytest.mark.parametrize("count", [10, 45])
def test_rows_of_token_ids_are_drawn_as_from_a_list(count, read, tmp_path):
    rows = random_tokens(50, 6)
    np.save(tmp_path / "some.npy", rows)
    expected = random.Random(3).sample([Sample(tuple(row)) for row in rows.tolist()], count)
    assert read(tmp_path / "some.npy", samples=count, seed=3).samples == tuple(expected)


def test_of_many_token_ids_only_the_drawn_ones_are_in_memory(read, tmp_path):
    np.save(tmp_path / "some.npy", random_tokens(2000, 1000))
    tracemalloc.start()
    try:
        read(tmp_path / "some.npy", samples=4)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_the_fingerprint_knows_where_decode_begins(read, tmp_path):
    paths = [
        write_jsonl(tmp_path / f"{i}.jsonl", [{"prompt": p, "response": r}])
        for i, (p, r) in enumerate([("abc", "d"), ("ab", "cd")])
    ]
    first, second = (read(path) for path in paths)
    assert first.samples[0].tokens == second.samples[0].tokens
    assert first.fingerprint != second.fingerprint


def test_fewer_samples_than_asked_for_are_all_taken_with_a_warning(read, tmp_path, caplog):
    np.save(tmp_path / "some.npy", random_tokens(3, 6))
    assert len(read(tmp_path / "some.npy", samples=10).samples) == 3
    assert "3 samples, fewer than the 10" in caplog.text


# --- much text


@pytest.fixture
def little(monkeypatch):
    """Text is much from 1,000 characters on, and its pieces have 50."""
    monkeypatch.setattr(calibration, "_WHOLE_TEXT", 1000)
    monkeypatch.setattr(calibration, "_PIECE", 50)


class Counting:
    """The demo tokenizer, and the length of the longest text that it was given, and of all of them."""

    def __init__(self, tokenizer):
        self.tokenizer, self.longest, self.all = tokenizer, 0, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, text, **options):
        self.longest, self.all = max(self.longest, len(text)), self.all + len(text)
        return self.tokenizer(text, **options)


@pytest.mark.parametrize("rows", [None, 7, 400])
def test_of_much_text_pieces_are_drawn_by_the_seed(rows, read, little, demo_tokenizer, tmp_path, caplog):
    text = "".join(f"{number:05}" for number in range(20_000))
    path = tmp_path / ("some.jsonl" if rows else "some.txt")
    if rows:
        write_jsonl(path, [{"text": text[i : i + rows]} for i in range(0, len(text), rows)])
    else:
        path.write_text(text)
    tokenizer = Counting(demo_tokenizer)
    first, again, other = (
        read(path, samples=4, seq_len=20, seed=seed, tokenizer=tokenizer).samples for seed in (1, 1, 2)
    )
    assert first == again and set(first).isdisjoint(other)
    assert tokenizer.longest <= 50 and 3 * 1200 < tokenizer.all < 3 * 2800
    assert "".join(map(chr, first[0].tokens[-5:])) in text
    drawn = re.search(r"samples are drawn from ([\d,]+) of the 100,000 characters of text that were read", caplog.text)
    assert 1200 < int(drawn[1].replace(",", "")) < 2800


def test_text_that_is_not_much_is_tokenized_whole(read, little, demo_tokenizer, tmp_path, caplog):
    (tmp_path / "some.txt").write_text("abcdefghij" * 100)
    tokenizer = Counting(demo_tokenizer)
    assert len(read(tmp_path / "some.txt", seq_len=11, samples=100, tokenizer=tokenizer).samples) == 100
    assert tokenizer.longest == 1000
    assert not caplog.records


def test_all_pieces_are_used_where_so_many_tokens_are_wanted(read, little, demo_tokenizer, tmp_path, caplog):
    (tmp_path / "some.txt").write_text("abcdefghij" * 500)
    assert len(read(tmp_path / "some.txt", seq_len=51, samples=100).samples) == 100
    assert not caplog.records


def test_texts_of_an_endless_set_are_not_all_read(read, monkeypatch):
    def rows(*_):
        for number in range(10_000):
            yield f"row {number}", {"text": "a" * 100_000}
            assert number < 1000, "it reads on"

    monkeypatch.setattr(sources, "source_rows", rows)
    monkeypatch.setattr(calibration, "_WHOLE_TEXT", 100_000)
    assert len(read("org/endless", samples=4, seq_len=20).samples) == 4


# --- what is refused


def refused(read, source: Path, says: str, **settings) -> None:
    with pytest.raises(QsunError, match=says) as error:
        read(source, **settings)
    assert str(source) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n", "is empty"),
        ("a.txt", b"too short", r"too short: 10 tokens, and one sample is 64; use --seq-len 10"),
        ("a.txt", b"one\ntwo\nthr\xffee\n", r"line 3: not valid UTF-8"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "\xff"}\n', r"line 3: not valid UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', r"line 3: not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1, 2]\n', r"line 2: not a JSON object"),
        ("a.jsonl", b'{"text": "a"}\n{"prompt": "b"}\n', r"line 2: needs 'messages', .* it has prompt"),
        ("a.jsonl", b'{"text": "a"}\n{"response": "b"}\n', r"line 2: needs .* it has response"),
        (
            "a.jsonl",
            b"{}\n",
            r"line 1: needs 'messages', .* 'text'; it has nothing",
        ),
        ("a.jsonl", b'{"text": "too short"}\n', "too short: 10 tokens"),
        ("a.jsonl", b'{"text": null}\n', r"line 1: .*text"),
        ("a.jsonl", b'{"prompt": "a", "response": null}\n', r"line 1: .*response"),
        ("a.jsonl", b'{"prompt": ["a"], "response": "b"}\n', r"line 1: .*prompt"),
        ("a.jsonl", b'{"messages": "hello"}\n', r"line 1: .*messages"),
        ("a.jsonl", b'{"messages": [1, 2]}\n', r"line 1: .*messages"),
        ("a.jsonl", b'{"messages": []}\n', r"line 1: messages need an assistant turn after a prompt"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}\n', r"line 1: messages need an assistant turn"),
        ("a.jsonl", b'{"messages": [{"role": "assistant", "content": "a"}]}\n', r"line 1: messages need an assistant"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
            r"line 1: .*roles user and assistant only",  # the template's own words
        ),
        ("a.npy", b"", "not a valid .npy file"),
        ("a.npy", b"\x93NUMPY\x01\x00", "not a valid .npy file"),
    ],
)
def test_bad_files_are_refused_by_name_and_line(name, content, says, read, tmp_path):
    (tmp_path / name).write_bytes(content)
    refused(read, tmp_path / name, says)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"], ids=ascii)
def test_a_line_of_jsonl_ends_at_a_newline_and_nowhere_else(separator, read, tmp_path):
    """JSON strings may hold Unicode's other line separators as they are; web text does."""
    path = tmp_path / "some.jsonl"
    row = json.dumps({"prompt": f"a{separator}b", "response": "xyz"}, ensure_ascii=False)
    path.write_text(row + "\n", encoding="utf-8")
    assert len(read(path).samples) == 1


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 3), dtype=np.float32),
        np.zeros(3, dtype=np.int64),
        np.zeros((2, 3, 4), dtype=np.int64),
        np.zeros((2, 3), dtype=bool),
        np.zeros((0, 3), dtype=np.int64),
        np.zeros((3, 0), dtype=np.int64),
    ],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)
def test_npy_must_hold_integers_by_sample_and_position(array, read, tmp_path):
    np.save(tmp_path / "some.npy", array)
    says = r"must be integers \[samples, length\]" if array.dtype.kind == "i" else "save token ids, which are integers"
    refused(read, tmp_path / "some.npy", says)


class _Bomb:
    def __reduce__(self):
        return (sys.exit, ("a pickle was run",))


def test_pickles_are_never_run(read, tmp_path):
    np.save(tmp_path / "array.npy", np.array([[_Bomb()]], dtype=object), allow_pickle=True)
    (tmp_path / "plain.npy").write_bytes(pickle.dumps(_Bomb()))
    for name in ("array.npy", "plain.npy"):
        refused(read, tmp_path / name, "not a valid .npy file")


def test_an_npz_archive_is_no_npy_file(read, tmp_path):
    with open(tmp_path / "some.npy", "wb") as file:
        np.savez(file, tokens=random_tokens(2, 4))
    refused(read, tmp_path / "some.npy", "npy")


@pytest.mark.parametrize("token", [VOCAB, -1])
def test_tokens_outside_the_vocabulary_are_refused(token, read, tmp_path):
    rows = random_tokens(3, 4)
    rows[2, 1] = token
    np.save(tmp_path / "some.npy", rows)
    refused(read, tmp_path / "some.npy", rf"token {token}, outside the model's vocabulary of {VOCAB}")


def test_text_of_a_larger_tokenizer_is_refused(demo_tokenizer, tmp_path):
    (tmp_path / "some.txt").write_text("abcdefgh")
    with pytest.raises(QsunError, match=r"token 102 \('f'\), outside the model's vocabulary of 100"):
        read_calibration([str(tmp_path / "some.txt")], demo_tokenizer, 100, 1, 4, 0)


def test_messages_without_a_template_are_refused(demo_tokenizer, read, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_tokenizer, "chat_template", None)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write_jsonl(tmp_path / "some.jsonl", [{"messages": messages}])
    refused(read, path, "line 1: the model's tokenizer has no chat template")


@pytest.mark.parametrize("name", ["some.txt", "some.jsonl"])
def test_text_without_a_tokenizer_is_refused(name, read, tmp_path):
    (tmp_path / name).write_text('{"text": "abc"}\n')
    refused(read, tmp_path / name, "the model directory has none; give .npy token ids", tokenizer=None)


def test_the_packaged_text_without_a_tokenizer_is_refused(read):
    with pytest.raises(QsunError, match=r"needs a tokenizer.* give \.npy"):
        read(BUILTIN, tokenizer=None)


@pytest.mark.parametrize("name", ["some.txt", "some.jsonl", "some.npy"])
def test_a_file_that_is_not_there_is_refused(name, read, tmp_path):
    refused(read, tmp_path / name, "does not exist")


def test_what_is_no_data_set_is_refused(read, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(read, tmp_path / "nothing", "cannot be loaded as a data set")


def test_a_data_set_row_with_missing_fields_is_named(read, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"question": "a"}])
    refused(read, tmp_path, r"row 0: needs 'messages', .* it has question")


def test_data_sets_without_the_package_say_what_to_install(read, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(read, tmp_path, r"qsun\[data\]")


def test_fewer_samples_than_sources_are_refused(read, tmp_path):
    sources = [write_jsonl(tmp_path / f"{n}.jsonl", [{"prompt": "ab", "response": "c"}]) for n in range(3)]
    with pytest.raises(QsunError, match="--samples 2 leaves some of 3 calibration sources out; raise --samples"):
        read(*sources, samples=2)
    assert len(read(*sources, samples=3).samples) == 3


def test_no_source_at_all_is_refused(read):
    with pytest.raises(QsunError, match="calibration"):
        read()
