"""Log-probabilities, offsets and usage in an answer: tokens that are part of a character, prompts and their choices."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qsun.engine.requests import TokenLogprob, Update
from qsun.runtime.row_text import RowText
from qsun.serve.api.answers import Answer
from qsun.serve.api.token_text import Spelling

TEXT = "a€b é!"


@pytest.fixture(scope="module")
def byte_level():
    """A token for each byte, as byte-level BPE begins."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def updates_of(tokenizer, tokens):
    row = RowText(tokenizer, ())
    for place, token in enumerate(tokens):
        row.add(token)
        last = place == len(tokens) - 1
        text = row.rest(False) if last else row.fresh()
        yield Update("r", (token,), text, "length" if last else "", "", (TokenLogprob(token, -0.5, ((token, -0.5),)),))


def answers(tokenizer, chat):
    """The same answer whole, and by its chunks."""
    tokens = tokenizer(TEXT)["input_ids"]
    answer = Answer(chat, "m", [3], 1, Spelling(tokenizer), False)
    chunks = []
    for update in updates_of(tokenizer, tokens):
        answer.choices[0].take(update)
        chunks.append(json.loads(answer.chunk(answer.choices[0], update)[6:])["choices"][0])
    return answer.whole()["choices"][0], chunks


def test_bytes_of_tokens_join_to_the_text(byte_level):
    whole, chunks = answers(byte_level, chat=True)
    assert whole["message"]["content"] == TEXT
    for entries in (whole["logprobs"]["content"], [e for c in chunks for e in c["logprobs"]["content"]]):
        assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == TEXT
        assert entries[1]["bytes"] == [0xE2]  # of the euro sign
        assert entries[1]["top_logprobs"][0]["bytes"] == [0xE2]


def test_offsets_lie_in_the_text_and_a_stream_gives_the_same(byte_level):
    whole, chunks = answers(byte_level, chat=False)
    offsets = whole["logprobs"]["text_offset"]
    assert offsets == [0, 1, 1, 1, 2, 3, 4, 4, 5]
    assert offsets == [place for chunk in chunks for place in chunk["logprobs"]["text_offset"]]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"] == TEXT


def test_cached_tokens_add_up_over_prompts_and_not_over_choices():
    answer = Answer(False, "m", [70, 80], 2, Spelling(None), False)
    for choice, cached in zip(answer.choices, (64, 64, 0, 32), strict=True):
        choice.take(Update("r", (1,), "", "length", "", (), cached))
    assert answer.usage()["prompt_tokens_details"] == {"cached_tokens": 96}
    assert answer.usage()["prompt_tokens"] == 150


class Pieces:
    """What SentencePiece calls its pieces."""

    def __init__(self, *pieces):
        self.pieces = pieces

    def convert_ids_to_tokens(self, token):
        return self.pieces[token]

    def decode(self, tokens):
        return "".join(self.pieces[token] for token in tokens).strip()


def test_pieces_and_bytes_of_sentencepiece():
    spelling = Spelling(Pieces("\N{LOWER ONE EIGHTH BLOCK}the", "<0xE2>", "end"))
    assert [spelling.bytes(token) for token in range(3)] == [b" the", b"\xe2", b"end"]
    assert Spelling(None).bytes(0) == b""
