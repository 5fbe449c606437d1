"""How a single token is shown: as text where it is whole characters, as bytes where it is not."""

import re
from functools import lru_cache
from typing import Any

BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # of tokenizers that fall back to bytes


class TokenNames:
    """The names of a tokenizer's tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def name(self, token: int) -> str:
        """Its text, or `bytes:\\xe2\\x96` where that is no whole text."""
        text = self._text(token)
        if "\ufffd" not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.raw(token))

    def raw(self, token: int) -> bytes:
        """The bytes that it stands for."""
        text = self._text(token)
        if "\ufffd" not in text:
            return text.encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return text.encode()
        if found := BYTE.fullmatch(piece):
            return bytes([int(found[1], 16)])
        letters = byte_letters()
        return bytes(letters[letter] for letter in piece) if all(map(letters.__contains__, piece)) else text.encode()

    def _text(self, token: int) -> str:
        text: str = self._tokenizer.decode([token], skip_special_tokens=False)
        return text


@lru_cache(maxsize=1)
def byte_letters() -> dict[str, int]:
    """The letters by which byte-level tokenizers write bytes: a visible one is itself, others follow from 256 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + at): byte for at, byte in enumerate(others)}
