"""What is cut from a conversation that is too long: by hand, and as properties over all of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baichuan_sft.data.findings import RecordFault
from baichuan_sft.data.length import TRUNCATION, fit
from baichuan_sft.data.template import EOS, IGNORE, Rendered
from baichuan_sft.errors import UserError

_ = IGNORE
#                 s   u         a           u       a         u       a
IDS = [9, 195, 11, 12, 196, 21, 22, 195, 13, 196, 23, 195, 14, 196, 24, 25, EOS]
LABELS = [_, _, _, _, _, 21, 22, EOS, _, _, 23, EOS, _, _, 24, 25, EOS]


def rendered(ids, labels, turns=()):
    return Rendered(np.array(ids, np.int32), np.array(labels, np.int32), list(turns))


SEGMENT = rendered(IDS, LABELS, [1, 4, 7, 9, 11, 13])


def cut(max_length, policy):
    return [(piece.input_ids.tolist(), piece.labels.tolist()) for piece in fit(SEGMENT, max_length, policy)]


@pytest.mark.parametrize("policy", TRUNCATION)
def test_what_fits_is_left_alone(policy):
    assert cut(17, policy) == [(IDS, LABELS)]


@pytest.mark.parametrize(
    "max_length, ids, labels",
    [
        (16, [*IDS[:11], EOS], LABELS[:12]),
        (12, [*IDS[:11], EOS], LABELS[:12]),
        (11, [*IDS[:7], EOS], LABELS[:8]),
        (8, [*IDS[:7], EOS], LABELS[:8]),
        (7, IDS[:6], LABELS[:6]),  # a whole answer with no room for its end would end untaught: it is cut
        (6, IDS[:6], LABELS[:6]),
    ],
)
def test_cut_turns_ends_with_the_end_of_a_turn(max_length, ids, labels):
    assert cut(max_length, "cut_turns") == [(ids, labels)]


def test_cut_turns_without_a_target_leaves_nothing():
    assert cut(5, "cut_turns") == []
    untrained = rendered(IDS, [_] * 10 + LABELS[10:], SEGMENT.turns)
    assert [piece.input_ids.tolist() for piece in fit(untrained, 12, "cut_turns")] == [[*IDS[:11], EOS]]
    assert fit(untrained, 9, "cut_turns") == []


@pytest.mark.parametrize(
    "max_length, ids, labels",
    [
        (16, [9, *IDS[7:]], [_, _, *LABELS[8:]]),
        (11, [9, *IDS[7:]], [_, _, *LABELS[8:]]),
        (10, [9, *IDS[11:]], [_, _, *LABELS[12:]]),
        (7, [9, *IDS[11:]], [_, _, *LABELS[12:]]),
        (6, [9, 195, 196, 24, 25, EOS], [_, _, _, 24, 25, EOS]),  # the question's text is gone
    ],
)
def test_cut_left_keeps_the_system_text_and_the_last_answer(max_length, ids, labels):
    assert cut(max_length, "cut_left") == [(ids, labels)]


def test_cut_left_never_cuts_an_answer():
    assert cut(5, "cut_left") == []


def test_drop_and_error():
    assert cut(16, "drop") == []
    with pytest.raises(
        RecordFault, match=r"17 tokens, the prompt alone 5, longer than model_max_length 16"
    ) as caught:
        cut(16, "error")
    assert caught.value.code == "DATA024"
    with pytest.raises(UserError, match="unknown truncation 'cut_lft', did you mean 'cut_left'"):
        cut(16, "cut_lft")


def test_a_document_is_split_and_loses_nothing():
    document = rendered([*range(30, 40), EOS], [_, *range(31, 40), EOS])
    pieces = fit(document, 4, "cut_turns")
    assert [piece.input_ids.tolist() for piece in pieces] == [
        [30, 31, 32, 33],
        [34, 35, 36, 37],
        [38, 39, EOS],
    ]
    assert [piece.labels.tolist() for piece in pieces] == [[_, 31, 32, 33], [_, 35, 36, 37], [_, 39, EOS]]
    assert fit(document, 4, "drop") == []
    pieces = fit(document, 5, "cut_turns")  # 5 and 4 and 2, for eos must have something before it
    assert [piece.input_ids.tolist() for piece in pieces] == [[*range(30, 35)], [*range(35, 39)], [39, EOS]]


@st.composite
def conversations(draw):
    """A rendered conversation as the template makes them, texts of 0 to 6 tokens."""
    ids, labels, turns = [7] * draw(st.integers(0, 3)), [], []
    labels = [_] * len(ids)
    last_trained = False
    for number in range(draw(st.integers(1, 4))):
        turns.append(len(ids))
        question, answer = draw(st.integers(0, 6)), draw(st.integers(1, 6))
        ids += [195] + [10] * question
        labels += [EOS if last_trained else _] + [_] * question
        turns.append(len(ids))
        last_trained = draw(st.booleans()) or number == 0
        ids += [196] + [20 + number] * answer
        labels += [_] + ([20 + number] if last_trained else [_]) * answer
    return rendered([*ids, EOS], [*labels, EOS if last_trained else _], turns)


@given(conversations(), st.integers(2, 40), st.sampled_from(["cut_turns", "cut_left", "drop"]))
def test_properties_of_every_policy(segment, max_length, policy):
    for piece in fit(segment, max_length, policy):
        assert 2 <= len(piece.input_ids) == len(piece.labels) <= max_length
        assert any(label != _ for label in piece.labels[1:])
        # A target is the token itself, or the end of a turn over the next marker or over eos.
        assert all(
            label in (_, token) or (label == EOS and token == 195)
            for token, label in zip(piece.input_ids, piece.labels)
        )
        assert piece.input_ids.dtype == piece.labels.dtype == np.int32
        answers = [label for label in piece.labels.tolist() if label not in (_, EOS)]
        kept_whole = {a for a in answers if answers.count(a) == segment.labels.tolist().count(a)}
        ends = piece.labels.tolist().count(EOS)
        assert ends >= len(kept_whole)
        if policy == "cut_left":
            assert piece.labels[-1] == segment.labels[-1]
            assert set(answers) == kept_whole
