"""Training ids and labels against the vendor's preprocessing, and what becomes a target."""

import json

import numpy as np
import pytest
import torch
from fixtures import GOLDEN, SHARED, SMALL_VOCABULARY
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from baichuan_sft.data.formats import Message
from baichuan_sft.data.template import EOS, IGNORE, render, render_batch
from baichuan_sft.errors import UserError
from baichuan_sft.model.tokenization_baichuan import BaichuanTokenizer

TOKENIZER = BaichuanTokenizer(SMALL_VOCABULARY)
VENDOR_ROLES = {"human": "user", "gpt": "assistant", "assistant": "assistant"}
LITERALS = ("<s>", "</s>", "<unk>", "<reserved_")


class Letters:
    """Each letter is an id, so a case can be written by hand."""

    user_token_id, assistant_token_id = 195, 196

    def encode_texts(self, texts, num_threads=-1):
        return [[ord(letter) - ord("a") + 10 for letter in text] for text in texts]


def turns(*texts):
    """user, assistant, user, ... of these texts."""
    roles = ["user", "assistant"] * len(texts)
    return [Message(role, text) for role, text in zip(roles, texts)]


_ = IGNORE


def test_labels_by_hand():
    messages = [Message("system", "z"), *turns("ab", "cd", "e", "f")]
    expected = [
        # system user text    assistant text  user  text  assistant text  eos
        [35, 195, 10, 11, 196, 12, 13, 195, 14, 196, 15, 2],
        [_, _, _, _, _, 12, 13, EOS, _, _, 15, EOS],
    ]
    rendered = render(messages, Letters())
    assert [rendered.input_ids.tolist(), rendered.labels.tolist()] == expected
    assert rendered.input_ids.dtype == rendered.labels.dtype == np.int32 and rendered.turns == [1, 4, 7, 9]
    last = render(messages, Letters(), train_on="last")
    assert last.input_ids.tolist() == expected[0]
    assert last.labels.tolist() == [_, _, _, _, _, _, _, _, _, _, 15, EOS]


def test_an_untrained_turn_is_context():
    messages = [*turns("a"), Message("assistant", "b", train=False), *turns("c", "d", "e")]
    rendered = render(messages, Letters())
    assert rendered.input_ids.tolist() == [195, 10, 196, 11, 195, 12, 196, 13, 195, 14]
    assert rendered.labels.tolist() == [
        _,
        _,
        _,
        _,
        _,
        _,
        _,
        13,
        EOS,
        _,
    ]  # no eos at the end: the user's turn is open


def test_an_untrained_last_turn_teaches_no_eos():
    messages = [*turns("a", "b", "c"), Message("assistant", "d", train=False)]
    assert render(messages, Letters()).labels.tolist() == [_, _, _, 11, EOS, _, _, _, _]


@pytest.mark.parametrize(
    ("messages", "train_on", "message"),
    [
        (turns("a"), "all", "no assistant turn"),
        ([], "all", "no assistant turn"),
        ([*turns("a"), *turns("b", "c")], "all", r"two user turns in a row \(turns 0-1\)"),
        ([*turns("a", "b"), Message("assistant", "c")], "all", "turn 2: two assistant turns in a row"),
        ([*turns("a", "b"), Message("system", "c")], "all", "turn 2: a system turn after"),
        ([Message("system", "c"), Message("system", "c")], "all", "turn 1: a system turn after"),
        (turns("a", "b"), "lst", "unknown train_on 'lst', did you mean 'last'. Known: all, last"),
        ([*turns("a"), Message("assistant", "b", train=False)], "all", "no trained turn"),
        ([*turns("a", "b", "c"), Message("assistant", "d", train=False)], "last", "no trained turn"),
    ],
)
def test_what_cannot_be_trained_is_refused(messages, train_on, message):
    with pytest.raises(UserError, match=message):
        render(messages, Letters(), train_on=train_on)


def vendor_row(rendered, length):
    """ids, labels and mask as the vendor cuts and pads them to ``length``."""
    ids, labels = rendered.input_ids.tolist()[:length], rendered.labels.tolist()[:length]
    ids, labels = ids + [0] * (length - len(ids)), labels + [IGNORE] * (length - len(labels))
    return torch.tensor(ids), torch.tensor(labels), torch.tensor(ids) != 0


def why_skipped(conversation):
    """The reason why ours and the vendor's ids or labels differ by intention, or None."""
    if any(turn["from"] not in VENDOR_ROLES for turn in conversation):
        return "role the vendor trains as assistant text"
    if any(literal in turn["value"] for turn in conversation for literal in LITERALS):
        return "control literal in a text"
    return None


def cases(vocabulary):
    """(messages, row, expected tensors) that must be equal, and the reasons of the others."""
    small = vocabulary == "small"
    directory = GOLDEN / "small_tok" if small else SHARED / "golden" / "sft"
    prefix = "sft_" if small else ""
    records = json.loads((directory / f"{prefix}conversations.json").read_text(encoding="utf-8"))
    equal, skipped = [], []
    for row, record in enumerate(records):
        reason = why_skipped(record["conversations"])
        messages = [Message(VENDOR_ROLES.get(t["from"], ""), t["value"]) for t in record["conversations"]]
        try:
            if not reason:
                render(messages, TOKENIZER)
        except UserError as error:
            reason = str(error)
        if reason:
            skipped.append(reason)
        else:
            equal.append((row, messages))
    return equal, skipped, load_file(directory / f"{prefix}expected.safetensors")


@pytest.mark.parametrize("vocabulary", ["small", "baichuan2"])
@pytest.mark.parametrize("length", [64, 512])
def test_ids_and_labels_equal_the_vendor(vocabulary, length):
    path = (
        SMALL_VOCABULARY if vocabulary == "small" else SHARED / "tokenizer" / "baichuan2" / "tokenizer.model"
    )
    if not path.exists():
        pytest.skip(f"needs the vendor's vocabulary {path}")
    equal, skipped, gold = cases(vocabulary)
    rendered = render_batch([messages for _, messages in equal], BaichuanTokenizer(path))
    for (row, _messages), one in zip(equal, rendered):
        ids, labels, mask = vendor_row(one, length)
        assert torch.equal(ids, gold[f"len{length}/input_ids"][row].long())
        assert torch.equal(mask, gold[f"len{length}/attention_mask"][row].bool())
        assert torch.equal(
            labels[1:], gold[f"len{length}/labels"][row].long()[1:]
        )  # label 0 is ours to IGNORE
        assert labels[0] == IGNORE
    assert (len(equal), len(skipped)) == (43, 10)


texts = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=20
) | st.sampled_from(["</s>", "<reserved_106>", "a<reserved_107>b", "<unk><s>", ""])


@settings(max_examples=150)
@given(
    system=st.none() | texts, pairs=st.lists(st.tuples(texts, texts, st.booleans()), min_size=1, max_size=4)
)
def test_targets_are_the_trained_texts_and_their_eos(system, pairs):
    messages = [] if system is None else [Message("system", system)]
    for question, answer, train in pairs:
        messages += [Message("user", question), Message("assistant", answer, train)]
    trained = [answer for _, answer, train in pairs if train]
    if not trained:
        return
    rendered = render(messages, TOKENIZER)
    assert len(rendered.input_ids) == len(rendered.labels)
    targets = [label for label in rendered.labels.tolist() if label != IGNORE]
    answers: list[list[int]] = [[]]
    for label in targets:
        answers[-1].append(label) if label != EOS else answers.append([])
    assert [TOKENIZER.decode(ids) for ids in answers] == [*trained, ""]
    controls = [i for i in rendered.input_ids.tolist() if i in TOKENIZER.control_ids]
    assert controls == [195, 196] * len(pairs) + [EOS]
    same_place = [
        (i, label) for i, label in zip(rendered.input_ids, rendered.labels) if label not in (IGNORE, EOS)
    ]
    assert all(i == label for i, label in same_place)


def test_a_batch_is_its_conversations_encoded_in_one_call():
    conversations = [turns("你好", "你好！"), [Message("system", "s"), *turns("a", "b", "c", "d")]]
    calls = []

    class Counting(Letters):
        def encode_texts(self, texts, num_threads=-1):
            calls.append(len(texts))
            return TOKENIZER.encode_texts(texts)

    for together, alone in zip(
        render_batch(conversations, Counting()), [render(c, TOKENIZER) for c in conversations]
    ):
        assert np.array_equal(together.input_ids, alone.input_ids)
        assert np.array_equal(together.labels, alone.labels) and together.turns == alone.turns
    assert calls == [7]
