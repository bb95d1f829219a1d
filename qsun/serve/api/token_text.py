"""How a single token is written: its text, and the bytes that it stands for."""

import re
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's name of a byte that no piece has
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's


def _byte_alphabet() -> dict[str, int]:
    """Bytes by their character in GPT-2's byte-level alphabet: their own where it can be seen, else a later one."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


class Spelling:
    """Spells the tokens of a tokenizer; None spells nothing.

    A character can be several tokens. Their texts are then no characters, and only their bytes join up to it.
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
