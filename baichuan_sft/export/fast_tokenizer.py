"""A vocabulary of the family as a ``tokenizer.json``, for engines that run the tokenizers library.

The two algorithms meet piece by piece:

    SentencePiece                               tokenizers
    NFKC table, not over user-defined pieces    the same table without these
    dummy prefix (Baichuan-1)                   Prepend, after every control token too
    user-defined pieces are atomic              Split, then looked up whole (ignore_merges)
    highest score first, leftmost of equals     rank of the pair; equals sorted so that the left one wins
    no piece: UTF-8 bytes                       byte_fallback

``<s>``, ``</s>``, ``<unk>`` and ``<reserved_N>`` are special added tokens; ``split_special_tokens=True``
keeps them text.
Source: google/sentencepiece ``bpe_model.cc``, ``normalizer.cc``; huggingface/tokenizers ``models/bpe``.
"""

from __future__ import annotations

import base64
import re
import struct
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from baichuan_sft.errors import UserError

NORMAL, USER_DEFINED = 1, 4  # sentencepiece_model.proto, ModelProto.SentencePiece.Type
Pair = tuple[str, str]


def tokenizer_json(tokenizer: Any) -> dict[str, Any]:
    """What ``tokenizer.json`` holds for a ``BaichuanTokenizer``.

    Raises:
        UserError: it has more than its SentencePiece model.
    """
    more = sorted(name for i, name in tokenizer.added_tokens_decoder.items() if i >= tokenizer.vocab_size)
    what = f"added tokens ({', '.join(map(str, more[:3]))})" if more else ""
    if not what and tokenizer("a")["input_ids"] != tokenizer.encode_text("a"):
        what = "add_bos_token or add_eos_token"
    if what:
        raise UserError(
            f"{tokenizer.vocab_file}: its tokenizer has {what}, which this form has not; use `serve`."
        )
    model = read_pieces(tokenizer)
    names, charsmap = [name for name, _, _ in model.pieces], model.charsmap
    control = [names[i] for i in sorted(tokenizer.control_ids)]
    atoms = {name for name, _, kind in model.pieces if kind == USER_DEFINED} - set(control)
    atoms |= set("0123456789")  # in no longer piece of either vocabulary, so apart they change nothing
    atomic = re.compile("|".join(map(re.escape, sorted(atoms, key=lambda atom: (-len(atom), atom)))))
    scores = {n: score for n, score, kind in model.pieces if kind == NORMAL and not atomic.search(n)}
    normalizers: list[dict[str, Any]] = []
    if model.add_dummy_prefix:  # first: a text of which the table leaves nothing has it too
        normalizers.append({"type": "Prepend", "prepend": " "})
    if charsmap:
        # The library maps "\r\n" by its first character, and most characters apart from their accents. What
        # still differs: two marks on one character, and a mark or joiner after one that the table splits.
        table = base64.b64encode(without(charsmap, atoms)).decode()
        normalizers += [_replace("\r", " "), {"type": "NFC"}]
        normalizers += [{"type": "Precompiled", "precompiled_charsmap": table}, {"type": "NFC"}]
    normalizers.append(_replace(" ", "▁"))
    splits = [_split(atomic.pattern)]
    if torn := [_first_of(pieces) for pieces in torn_pieces(tokenizer, names, atomic)]:
        splits.append(_split(rf"\A(?:{'|'.join(torn)})"))
    decoders = [_replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if model.add_dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": names.index(name), "content": name, "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for name in control
        ],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits},
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": True,
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": [list(pair) for pair in merges(scores)],
        },
    }


def merges(scores: dict[str, float]) -> list[Pair]:
    """All pairs of pieces that make a piece, in the order in which SentencePiece would merge them.

    Of two equal scores the left one is merged first, which matters where they share a symbol:

        x y z    xy and yz are pieces of one score  ->  (x, y) ranks before (y, z)
    """
    by_score: dict[float, list[Pair]] = defaultdict(list)
    for piece, score in scores.items():
        pairs = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        by_score[score] += [pair for pair in pairs if pair[0] in scores and pair[1] in scores]
    return [pair for score in sorted(by_score, reverse=True) for pair in _left_first(by_score[score])]


def _left_first(pairs: list[Pair]) -> list[Pair]:
    """Pairs of one score so that each comes before those that begin with its right half.

    Where that goes in a circle (a aa, aa a) the longer left half comes first: a run is merged from its left.
    """
    beginning: dict[str, set[Pair]] = defaultdict(set)
    for pair in pairs:
        beginning[pair[0]].add(pair)
    waits = dict.fromkeys(pairs, 0)
    after = {pair: beginning.get(pair[1], set()) - {pair} for pair in pairs}
    for later in after.values():
        for pair in later:
            waits[pair] += 1
    if not any(waits.values()):
        return pairs
    order = []
    while waits:
        pair = min(waits, key=lambda p: (waits[p] > 0, -len(p[0]), p))
        del waits[pair]
        order.append(pair)
        for later_pair in after[pair] & waits.keys():
            waits[later_pair] -= 1
    return order


def torn_pieces(tokenizer: Any, names: list[str], atomic: re.Pattern[str]) -> Iterable[list[str]]:
    """Pieces of each text that is a piece's own name, but that SentencePiece gives others for.

    Looked up whole it would be that piece: ``</s>`` typed in a text, and merges that no score leads to.
    """
    whole = [name for name in names if not atomic.search(name)]
    # A line end keeps the dummy prefix apart; it is atomic, so nothing merges across it.
    encoded = tokenizer.encode_texts(["\n" + name.replace("▁", " ") for name in whole])
    line_end = len(tokenizer.encode_text("\n"))
    for name, ids in zip(whole, encoded):
        pieces = tokenizer.convert_ids_to_tokens(ids[line_end:])
        if pieces != [name] and "".join(pieces) == name:
            yield pieces


def _first_of(pieces: list[str]) -> str:
    return rf"{re.escape(pieces[0])}(?={re.escape(''.join(pieces[1:]))}\z)"


def _replace(what: str, by: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": what}, "content": by}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


# --- the files of SentencePiece ------------------------------------------------------------------------


class Pieces:
    """Of a SentencePiece model: ``pieces`` (name, score, type) by id, its NFKC table, its dummy prefix."""

    def __init__(self, model: bytes) -> None:
        from baichuan_sft.model.sentencepiece_baichuan import _fields

        self.pieces: list[tuple[str, float, int]] = []
        self.charsmap, self.add_dummy_prefix = b"", True  # the default of the format
        for number, start, end in _fields(model, 0, len(model)):
            inner = [(n, model[a:b]) for n, a, b in _fields(model, start, end)] if number in (1, 3) else []
            if number == 1:
                fields = dict(inner)
                score = struct.unpack("<f", fields.get(2, bytes(4)))[0]
                self.pieces.append((fields[1].decode(), score, (fields.get(3) or b"\1")[0]))
            for name, value in inner if number == 3 else []:
                if name == 2:
                    self.charsmap = value
                elif name == 3:
                    self.add_dummy_prefix = value != b"\0"


def read_pieces(tokenizer: Any) -> Pieces:
    return Pieces(tokenizer._model_bytes)


def without(charsmap: bytes, atoms: Iterable[str]) -> bytes:
    """The NFKC table less the entries of the atoms, which SentencePiece never normalises.

    4 bytes size of the trie; the trie, 4 bytes per unit; then the texts. A unit holds the byte that leads
    to it, whether a key ends there (bit 8), and where its children lie.
    Source: s-yata/darts-clone ``DoubleArrayImpl``, sentencepiece ``Normalizer::EncodePrecompiledCharsMap``.
    """
    size = struct.unpack_from("<I", charsmap)[0]
    units = list(struct.unpack_from(f"<{size // 4}I", charsmap, 4))
    for atom in atoms:
        at = _offset(units[0])
        for place, byte in enumerate(key := atom.encode(), start=1):
            at ^= byte
            if units[at] & 0x800000FF != byte:
                break
            if place == len(key):
                units[at] &= ~(1 << 8)  # not the leaf: keys of one text share it
            at ^= _offset(units[at])
    return struct.pack(f"<I{len(units)}I", size, *units) + charsmap[4 + size :]


def _offset(unit: int) -> int:
    return unit >> 10 << ((unit & 1 << 9) >> 6)
