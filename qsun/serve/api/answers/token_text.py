"""How a single token is written: its text, and the bytes that it stands for."""

import re
from functools import cache
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's name of a byte that no piece has
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's


@cache
def _byte_alphabet() -> dict[str, int]:
    """Return bytes by their character in GPT-2's alphabet: their own where it is printable, else one past 255."""
    characters = sorted(ByteLevel.alphabet())
    own = {character: ord(character) for character in characters if ord(character) < 256}
    hidden = sorted(set(range(256)) - set(own.values()))
    return own | dict(zip(characters[len(own) :], hidden, strict=True))


class Spelling:
    """Spells the tokens of a tokenizer; None spells nothing.

    Several tokens can spell one character. Their texts are then not characters; only their bytes, joined, give it.
    """

    def __init__(self, tokenizer: Any | None):
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        byte_level = backend is not None and "ByteLevel" in repr(backend.decoder)
        self._alphabet = _byte_alphabet() if byte_level else {}

    def text(self, token: int) -> str:
        return "" if self._tokenizer is None else self._tokenizer.decode([token])

    def bytes(self, token: int) -> bytes:
        if self._tokenizer is None:
            return b""
        piece = self._tokenizer.convert_ids_to_tokens(token) or ""
        single = _BYTE.fullmatch(piece)
        if single:
            return bytes([int(single.group(1), 16)])
        if self._alphabet and all(character in self._alphabet for character in piece):
            return bytes(self._alphabet[character] for character in piece)
        if piece.startswith(_SPACE):
            return piece.replace(_SPACE, " ").encode()
        return self.text(token).encode("utf-8", "replace")
