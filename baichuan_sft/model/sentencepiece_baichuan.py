"""What lies under the tokenizer: a SentencePiece file read and patched, and texts it can take."""

from __future__ import annotations

import os
from collections.abc import Iterator

from sentencepiece import SentencePieceProcessor

PIECE_TYPE_CONTROL = 3  # sentencepiece_model.proto, ModelProto.SentencePiece.Type


def read_model(vocab_file: str | os.PathLike[str] | None) -> bytes:
    """Bytes of a SentencePiece model.

    Raises:
        ValueError: no file is given, or it holds something else.
    """
    if vocab_file is None:
        raise ValueError("there is no tokenizer.model; copy it from the Baichuan model")
    with open(vocab_file, "rb") as file:
        model = file.read()
    try:
        SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        hint = (
            " (a Git LFS pointer: run git lfs pull)" if model.startswith(b"version https://git-lfs") else ""
        )
        raise ValueError(f"{vocab_file}: not a SentencePiece model, {len(model)} bytes{hint}") from None
    return model


def check_encodable(text: str) -> None:
    """
    Raises:
        ValueError: the text holds a lone surrogate, which no UTF-8 text can. TypeError: it is no text.
    """
    if not isinstance(text, str):
        raise TypeError(f"expected a text, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code, at = ord(text[error.start]), error.start
        raise ValueError(
            f"text has a lone surrogate U+{code:04X} at character {at}, no valid UTF-8"
        ) from None


def with_control_type(model: bytes, ids: frozenset[int]) -> bytes:
    """The SentencePiece model with the type of the pieces ``ids`` set to CONTROL.

    Field 1 of the ModelProto repeats, one piece per id in order; field 3 of a piece is its type, one
    byte, so nothing moves. Walked by hand because protobuf is not always installed.
    """
    patched = bytearray(model)
    pieces = [(start, end) for field, start, end in _fields(model, 0, len(model)) if field == 1]
    for i in ids:
        for field, start, end in _fields(model, *pieces[i]):
            if field == 3:
                assert end - start == 1, f"type of piece {i} is not one byte"
                patched[start] = PIECE_TYPE_CONTROL
    return bytes(patched)


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, end) of every protobuf field in ``data[at:end]``, start and end of its payload."""
    while at < end:
        tag, at = _varint(data, at)
        if tag & 7 == 0:
            stop = _varint(data, at)[1]
        elif tag & 7 == 2:
            size, at = _varint(data, at)
            stop = at + size
        else:
            stop = at + {1: 8, 5: 4}[tag & 7]
        yield tag >> 3, at, stop
        at = stop


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1
