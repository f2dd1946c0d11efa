"""SentencePiece tokenizer of the Baichuan family, with control ids that no text can forge.

Two ways to encode. The default one is the vendor's: the literals ``<s>``, ``</s>``, ``<unk>`` and
``<reserved_N>`` inside a text become control ids. ``split_special_tokens=True``, ``encode_text``,
``encode_texts`` and ``apply_chat_template`` use the safe one: every text stays text.

Source: baichuan-inc/Baichuan2-7B-Chat ``tokenization_baichuan.py``.
"""

from __future__ import annotations

import os
import re
from functools import cached_property
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import AddedToken, PreTrainedTokenizer

from .chat_template_baichuan import ASSISTANT_TOKEN_ID, USER_TOKEN_ID, ChatTemplateMixin
from .sentencepiece_baichuan import check_encodable, read_model, with_control_type

RESERVED = re.compile(r"<reserved_\d+>")


class BaichuanTokenizer(ChatTemplateMixin, PreTrainedTokenizer):  # type: ignore[misc]
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
        self._model_bytes = read_model(vocab_file)
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
        model = with_control_type(self._model_bytes, self.control_ids - {0, 1, 2})
        return SentencePieceProcessor(model_proto=model, **self.sp_model_kwargs)

    def encode_text(self, text: str) -> list[int]:
        """Ids of one text the safe way: none is in ``control_ids``, none is added.

        Raises:
            ValueError: the text holds a lone surrogate, which no UTF-8 text can.
        """
        return self.encode_texts([text])[0]

    def encode_texts(self, texts: list[str], num_threads: int = -1) -> list[list[int]]:
        """``encode_text`` of each, in one call to SentencePiece, by default on all cores."""
        try:
            "".join(texts).encode()  # all at once; each by itself only to say which
        except (UnicodeEncodeError, TypeError):
            for text in texts:
                check_encodable(text)
        return self._safe_sp_model.encode(texts, num_threads=num_threads)

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:  # type: ignore[override]
        """Pieces of a text; ``split_special_tokens=True`` keeps every literal as text."""
        if not kwargs.pop("split_special_tokens", self.split_special_tokens):
            return super().tokenize(text, split_special_tokens=False, **kwargs)
        check_encodable(text)
        return self._safe_sp_model.encode(text, out_type=str)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        check_encodable(text)
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
