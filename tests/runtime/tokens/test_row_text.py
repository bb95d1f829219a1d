"""The text of a row while it grows: stop strings end it, wherever tokens cut them, from the token on that may stop."""

import itertools

import pytest

from qsun.runtime.tokens.row_text import RowText


class Pieces:
    """Tokens that are strings."""

    def decode(self, tokens, skip_special_tokens=True):
        return "".join(tokens)


def shown(pieces, stops, from_token=1):
    """The text that a client sees, and the number of tokens that were read."""
    row, seen = RowText(Pieces(), stops), ""
    for count, piece in enumerate(pieces, 1):
        if row.add(piece, count >= from_token):
            return seen + row.rest(True), count
        seen += row.fresh()
    return seen + row.rest(False), len(pieces)


def expected(pieces, stops, from_token):
    """By its definition: the row ends with the first token that completes a stop string, and before that string."""
    for count in range(from_token, len(pieces) + 1):
        text, known = "".join(pieces[:count]), len("".join(pieces[: count - 1]))
        starts = [
            at for stop in stops for at in range(len(text)) if text.startswith(stop, at) and at + len(stop) > known
        ]
        if starts:
            return text[: min(starts)], count
    return "".join(pieces), len(pieces)


class Bytes:
    """Tokens that are bytes of UTF-8 text, or 256 for a special token; counts the tokens that it reads."""

    read = 0

    def decode(self, tokens, skip_special_tokens=True):
        self.read += len(tokens)
        return bytes(token for token in tokens if token < 256).decode(errors="replace")


@pytest.mark.parametrize(
    "tokens",
    [
        [256] * 400,
        [97, *[256] * 400, 98, *"\N{PARTY POPPER}".encode()],
        [0xBF] * 400,
        [97, *[0xE2] * 333, *"\N{PARTY POPPER}b".encode(), *[0xF0, 0x9F] * 20],
        list("\N{PARTY POPPER}".encode()) * 40,
        [*b"abc", *[0xC3, 256] * 100],
    ],
    ids=["special", "special inside", "lone bytes", "lone bytes inside", "characters", "lone and special"],
)
def test_a_long_run_without_whole_text_is_read_once_and_becomes_the_same_text(tokens):
    reader = Bytes()
    row, seen = RowText(reader, []), ""
    for token in tokens:
        assert not row.add(token)
        seen += row.fresh()
    assert seen + row.rest(False) == Bytes().decode(tokens)
    assert reader.read < 150 * len(tokens)


@pytest.mark.parametrize("stops", [["x"], ["x", "a longer one"], ["a longer one", "x"]], ids=repr)
def test_a_stop_string_before_the_least_number_of_tokens_does_not_end_the_answer(stops):
    assert shown("axbcdefgh", stops, from_token=4) == ("axbcdefgh", 9)
    assert shown("axbcdxgh", stops, from_token=4) == ("axbcd", 6)
    assert shown("abxcd", stops, from_token=3) == ("ab", 3)  # the first token that may end it


@pytest.mark.parametrize("stops", [[], ["a"], ["ab"], ["a", "bab"], ["abab", "b"], ["ba", "aab", "b"]], ids=repr)
def test_every_text_ends_where_the_definition_says(stops):
    texts = ["".join(letters) for letters in itertools.product("ab", repeat=5)]
    for text in texts:
        for pieces in (list(text), [text[:1], text[1:3], text[3:]], [text[:2], text[2:4], text[4:]]):
            for from_token in (1, 2, 3):
                assert shown(pieces, stops, from_token) == expected(pieces, stops, from_token), (pieces, from_token)
