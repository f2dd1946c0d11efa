"""SentencePiece tokenizer of the Baichuan family, with control ids that no text can forge.

Two ways to encode. The default one is the vendor's: the literals ``<s>``, ``</s>``, ``<unk>`` and
``<reserved_N>`` inside a text become control ids. ``split_special_tokens=True``, ``encode_text``,
``encode_texts`` and ``apply_chat_template`` use the safe one: every text stays text.

Source: baichuan-inc/Baichuan2-7B-Chat ``tokenization_baichuan.py``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import AddedToken, BatchEncoding, PreTrainedTokenizer

from .chat_baichuan import ASSISTANT_TOKEN_ID, CHAT_TEMPLATE, USER_TOKEN_ID, Turn, read_messages

RESERVED = re.compile(r"<reserved_\d+>")
PIECE_TYPE_CONTROL = 3  # sentencepiece_model.proto, ModelProto.SentencePiece.Type
ASSISTANT_MARK = -1  # no token, hence no padding id
# What transformers' apply_chat_template takes beside the conversation and template variables.
CHAT_OPTIONS = {"padding", "truncation", "max_length", "return_tensors", "return_dict"}
CHAT_OPTIONS |= {"return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens"}


class BaichuanTokenizer(PreTrainedTokenizer):
    """Slow tokenizer over a Baichuan ``tokenizer.model`` (64,000 or 125,696 pieces).

    Args:
        vocab_file: the SentencePiece model.
        add_bos_token, add_eos_token: put ``<s>`` before / ``</s>`` after every encoded text.
        sp_model_kwargs: passed to ``SentencePieceProcessor`` (enable_sampling, nbest_size, alpha).
    Raises:
        ValueError: the file is not a SentencePiece model, or not a Baichuan vocabulary.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str | os.PathLike[str] | None = None,
        unk_token: str | AddedToken = "<unk>",
        bos_token: str | AddedToken = "<s>",
        eos_token: str | AddedToken = "</s>",
        pad_token: str | AddedToken | None = "<unk>",
        add_bos_token: bool = False,
        add_eos_token: bool = False,
        sp_model_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        # transformers asks for the vocabulary inside its own __init__, so the model is there before it.
        self.vocab_file = vocab_file
        self.sp_model_kwargs = sp_model_kwargs or {}
        self._model_bytes = _read_model(vocab_file)
        self._load()
        # Old files say single_word, which the vendor's transformers ignored and today's obeys.
        added = kwargs.pop("added_tokens_decoder", {}).items()
        kwargs["added_tokens_decoder"] = {i: _without_single_word(token) for i, token in added}
        if add_bos_token or add_eos_token:
            kwargs["special_tokens_pattern"] = "_".join(["bos"] * add_bos_token + ["eos"] * add_eos_token)
        super().__init__(
            unk_token=str(unk_token),
            bos_token=str(bos_token),
            eos_token=str(eos_token),
            pad_token=None if pad_token is None else str(pad_token),
            sp_model_kwargs=self.sp_model_kwargs,
            **kwargs,
        )
        if add_bos_token or add_eos_token:
            # save_pretrained writes init_kwargs, but never the two flags: the pattern says the same.
            self.init_kwargs["special_tokens_pattern"] = self.special_tokens_pattern
        if self.chat_template is None:
            self.chat_template = self.default_chat_template

    def _load(self) -> None:
        self.sp_model = SentencePieceProcessor(model_proto=self._model_bytes, **self.sp_model_kwargs)
        pieces = self.sp_model.id_to_piece(list(range(self.sp_model.get_piece_size())))
        self._piece_to_id = {piece: i for i, piece in enumerate(pieces)}
        roles = pieces[USER_TOKEN_ID : ASSISTANT_TOKEN_ID + 1]
        if len(roles) < 2 or not all(map(RESERVED.fullmatch, roles)):
            raise ValueError(
                f"{self.vocab_file}: not a Baichuan vocabulary, ids {USER_TOKEN_ID} and {ASSISTANT_TOKEN_ID} "
                f"are {roles}, expected <reserved_N>; take tokenizer.model from the Baichuan model"
            )

    def __getstate__(self) -> dict[str, Any]:
        lazy = {"sp_model", "_piece_to_id", "_safe_sp_model", "control_ids", "default_chat_template"}
        return {key: value for key, value in self.__dict__.items() if key not in lazy}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # SentencePiece's own pickling drops sp_model_kwargs.
        self.__dict__.update(state)
        self._load()

    # Vocabulary

    @property
    def vocab_size(self) -> int:
        """Pieces of the SentencePiece model, without added tokens."""
        return len(self._piece_to_id)

    @property
    def user_token_id(self) -> int:
        """Id that opens a user turn."""
        return USER_TOKEN_ID

    @property
    def assistant_token_id(self) -> int:
        """Id that opens an assistant turn."""
        return ASSISTANT_TOKEN_ID

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids that no text encodes to the safe way: ``<unk> <s> </s>`` and every ``<reserved_N>``."""
        reserved = {i for piece, i in self._piece_to_id.items() if RESERVED.fullmatch(piece)}
        return frozenset(reserved | {0, 1, 2})

    def get_vocab(self) -> dict[str, int]:
        """Piece to id, added tokens included."""
        return self._piece_to_id | self._added_tokens_encoder

    def _convert_token_to_id(self, token: str) -> int:
        return self._piece_to_id.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return self.sp_model.id_to_piece(index)

    # Text to ids

    @cached_property
    def _safe_sp_model(self) -> SentencePieceProcessor:
        """The model with ``<reserved_N>`` as control pieces, which SentencePiece never matches in text."""
        model = _with_control_type(self._model_bytes, self.control_ids - {0, 1, 2})
        return SentencePieceProcessor(model_proto=model, **self.sp_model_kwargs)

    def encode_text(self, text: str) -> list[int]:
        """Ids of one text the safe way: none is in ``control_ids``, none is added.

        Raises:
            ValueError: the text holds a lone surrogate, which no UTF-8 text can.
        """
        return self.encode_texts([text])[0]

    def encode_texts(self, texts: list[str]) -> list[list[int]]:
        """``encode_text`` of each, in one call to SentencePiece, which uses all cores."""
        for text in texts:
            _check_encodable(text)
        return self._safe_sp_model.encode(texts)

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:  # type: ignore[override]
        """Pieces of a text; ``split_special_tokens=True`` keeps every literal as text."""
        if not kwargs.pop("split_special_tokens", self.split_special_tokens):
            return super().tokenize(text, split_special_tokens=False, **kwargs)
        _check_encodable(text)
        return self._safe_sp_model.encode(text, out_type=str)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        _check_encodable(text)
        return self.sp_model.encode(text, out_type=str)

    # Ids to text

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of pieces, with the vendor's space before every run of text that ends in a special token."""
        return self._text_of_ids([self._convert_token_to_id_with_added_voc(token) for token in tokens])

    def _text_of_ids(self, ids: list[int]) -> str:
        specials = set(self.all_special_ids) | set(self._added_tokens_decoder)
        text, run = "", []
        for i, token_id in enumerate(ids):
            if token_id not in specials:
                run.append(token_id)
                continue
            # The space belongs to the run, also when it is empty; only a first special goes without.
            space = " " if i > 0 and ids[i - 1] not in specials else ""
            text += space + self.sp_model.decode(run) + self.convert_ids_to_tokens(token_id)
            run = []
        return text + self.sp_model.decode(run)

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else [int(i) for i in token_ids]
        if skip_special_tokens:
            skipped = set(self.all_special_ids)
            ids = [i for i in ids if i not in skipped]
        text = self._text_of_ids(ids)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    # Chat

    @cached_property
    def default_chat_template(self) -> str:
        """Jinja form of the chat format, for engines that render text and encode it the vendor's way.

        Equal to the ids of ``apply_chat_template`` on ordinary text, but for one id: Baichuan-1's
        SentencePiece puts ``▁`` before any text, so without a system message the rendered string
        begins with it.
        """
        user, assistant = self.sp_model.id_to_piece([USER_TOKEN_ID, ASSISTANT_TOKEN_ID])
        # Encoded apart, each text of Baichuan-1 begins with ▁; inside one string a space gives that.
        prefix = " " if self.sp_model.encode("a", out_type=str)[0].startswith("▁") else ""
        return CHAT_TEMPLATE.replace("USER", user).replace("BOT", assistant).replace("PREFIX", prefix)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        tools: list[Any] | None = None,
        documents: list[Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        **options: Any,
    ) -> Any:
        """Prompt of one conversation or of a list of them: control ids by number, texts the safe way.

            system          user            assistant       user
            26553 29438 ... 195 16829 ...   196 20020 ...   195 ...     196 (add_generation_prompt)

        There is no ``</s>`` between turns, and no generation prompt after an assistant message.
        Arguments and results are those of transformers. No conversation is ever closed and every text
        is sanitized, so ``continue_final_message`` and ``sanitize_control_tokens`` hold already. A
        template other than ``default_chat_template`` goes to transformers, without that safety.

        Raises:
            ValueError: a message breaks a rule of ``read_messages``, or tools, documents or template
                variables are given, for which the format has no place.
        """
        if self.get_chat_template(chat_template, tools) == self.default_chat_template:
            given = {"tools": tools, "documents": documents, **options}
            unused = [name for name, value in given.items() if value and name not in CHAT_OPTIONS]
            if unused:
                raise ValueError(
                    f"the Baichuan chat format has no place for {', '.join(unused)}; leave it out"
                )
            if continue_final_message and add_generation_prompt:
                raise ValueError("continue_final_message and add_generation_prompt exclude each other")
            is_batch = bool(conversation) and isinstance(conversation[0], list | tuple)
            chats = [read_messages(chat) for chat in (conversation if is_batch else [conversation])]
            if tokenize:
                options.pop("sanitize_control_tokens", None)
                return self._encode_chats(chats, is_batch, add_generation_prompt, **options)
        return super().apply_chat_template(
            conversation,
            tools=tools,
            documents=documents,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=tokenize,
            **options,
        )

    def _encode_chats(
        self,
        chats: list[list[Turn]],
        is_batch: bool,
        add_generation_prompt: bool,
        return_tensors: str | None = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **pad_options: Any,
    ) -> Any:
        if return_assistant_tokens_mask and not return_dict:
            raise ValueError(
                "return_assistant_tokens_mask=True needs return_dict=True, it is an entry of the dict"
            )
        ids, marks = self._chat_ids(chats, add_generation_prompt)
        call = {**pad_options, **(tokenizer_kwargs or {}), "add_special_tokens": False}
        out = self(ids, **call)
        if return_assistant_tokens_mask:
            # The marks go the way of the ids, so they are cut and padded alike.
            rows = self(marks, **call)["input_ids"]
            out["assistant_masks"] = [[int(mark == ASSISTANT_MARK) for mark in row] for row in rows]
        if not is_batch and not return_tensors:
            out = BatchEncoding({key: rows[0] for key, rows in out.items()})
        out.convert_to_tensors(return_tensors)
        return out if return_dict else out["input_ids"]

    def _chat_ids(
        self, chats: list[list[Turn]], add_generation_prompt: bool
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Ids of each conversation, and as many marks: ``ASSISTANT_MARK`` over assistant text, else 0."""
        texts = iter(self.encode_texts([text for turns in chats for _, text in turns]))
        markers = {"system": [], "user": [USER_TOKEN_ID], "assistant": [ASSISTANT_TOKEN_ID]}
        ids: list[list[int]] = [[] for _ in chats]
        marks: list[list[int]] = [[] for _ in chats]
        for row, mark, turns in zip(ids, marks, chats):
            for role, _ in turns:
                text = next(texts)
                row += markers[role] + text
                mark += [0] * len(markers[role]) + [ASSISTANT_MARK if role == "assistant" else 0] * len(text)
            if add_generation_prompt and turns[-1][0] != "assistant":
                row.append(ASSISTANT_TOKEN_ID)
                mark.append(0)
        return ids, marks

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write the SentencePiece model, byte for byte what was loaded; returns its path."""
        name = (filename_prefix + "-" if filename_prefix else "") + self.vocab_files_names["vocab_file"]
        path = os.path.join(save_directory, name)
        with open(path, "wb") as file:
            file.write(self._model_bytes)
        return (path,)


class BaiChuanTokenizer(BaichuanTokenizer):
    """The same under the name that Baichuan-7B's files give it."""


def _without_single_word(token: AddedToken) -> AddedToken:
    kept = {name: getattr(token, name) for name in ("lstrip", "rstrip", "normalized", "special")}
    return AddedToken(token.content, **kept)


def _read_model(vocab_file: str | os.PathLike[str] | None) -> bytes:
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


def _check_encodable(text: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"expected a text, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code, at = ord(text[error.start]), error.start
        raise ValueError(
            f"text has a lone surrogate U+{code:04X} at character {at}, no valid UTF-8"
        ) from None


def _with_control_type(model: bytes, ids: frozenset[int]) -> bytes:
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
