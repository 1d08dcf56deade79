"""Decode sampled ids while keeping where each token's text ends."""

import codecs
from collections.abc import Sequence
from typing import Any


class TokenText:
    """Decodes byte-level BPE ids (Qwen, Llama 3, GPT) token by token, without re-decoding prefixes.

    Raises:
        ValueError: a tokenizer whose decoder is not byte-level.
    """

    def __init__(self, tokenizer: Any) -> None:
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        if "ByteLevel" not in repr(decoder):
            raise ValueError(
                f"tokenizer {type(tokenizer).__name__}: got the decoder {decoder!r}, wanted a "
                "byte-level BPE tokenizer, whose tokens map to text spans exactly"
            )
        self._tokenizer = tokenizer
        self._special = {
            index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self._added = {
            index: token.content.encode() for index, token in tokenizer.added_tokens_decoder.items()
        }
        self._byte_of = {char: byte for byte, char in _byte_characters().items()}
        self._bytes: dict[int, bytes] = {}

    def decode(self, token_ids: Sequence[int]) -> tuple[str, list[int]]:
        """Text, and for each token the character offset where its text ends.

        Special tokens have no text. Bytes that are not UTF-8 become U+FFFD; a token that ends
        inside a character ends, in the offsets, before it.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pieces: list[str] = []
        ends: list[int] = []
        length = 0
        for token_id in token_ids:
            piece = decoder.decode(self._token_bytes(token_id))
            pieces.append(piece)
            length += len(piece)
            ends.append(length)
        pieces.append(decoder.decode(b"", final=True))
        return "".join(pieces), ends

    def _token_bytes(self, token_id: int) -> bytes:
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._lookup(token_id)
        return known

    def _lookup(self, token_id: int) -> bytes:
        if token_id in self._special:
            return b""
        if token_id in self._added:
            return self._added[token_id]
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        # Padded vocabularies have ids without a token.
        return b"" if token is None else bytes(self._byte_of[char] for char in token)


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte (openai/gpt-2, encoder.py: bytes_to_unicode)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    return table | {byte: chr(256 + place) for place, byte in enumerate(hidden)}
