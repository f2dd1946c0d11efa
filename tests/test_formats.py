"""Records: what is accepted, what is refused, and with which code, words and place."""

import json
from collections import Counter

import pytest
from fixtures import ROOT, SHARED, needs_shared
from hypothesis import given
from hypothesis import strategies as st

from baichuan_sft.data.findings import CODES, RecordFault
from baichuan_sft.data.formats import FORMATS, MAX_NAMES, Message, check_order, count_name, escaped, parse
from baichuan_sft.data.texts import is_blank
from baichuan_sft.errors import UserError

# A record of each format that says a user text q and an assistant text a, or for "text" only a.
SAMPLES = {
    "belle": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    "sharegpt": lambda q, a: {"conversations": [{"role": "user", "content": q}, {"from": "bot", "value": a}]},
    "messages": lambda q, a: {
        "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
    },
    "alpaca": lambda q, a: {"instruction": q, "output": a},
    "text": lambda q, a: {"text": a},
}
RECORD_CODES = {code for code in CODES if "DATA010" <= code <= "DATA023" or "DATA030" <= code <= "DATA035"}
ROLES = "system, developer, human, user, 用户, gpt, assistant, bot, 助手"
KNOWN = "Known formats: belle, sharegpt, messages, alpaca, text; pass --data_format"
NO_TOOLS = "tool calls are not supported, remove the record"
SILENT_ANSWER = "it would teach the model to say nothing"
C, M, H = "conversations", "messages", "history"
HI = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}
ASK = {"instruction": "a", "output": "b"}


def turns(*pairs, **fields):
    return {"conversations": [{"from": role, "value": text} for role, text in pairs], **fields}


def belle(*first, **fields):
    """A record whose first turns are these, of any kind; one good pair follows."""
    return {"conversations": [*first, *HI], **fields}


def value(text, **fields):
    return belle({"from": "human", "value": text, **fields}, HI[1])


def said(role):
    return belle({"from": role, "value": "x"})


def openai(*first):
    return {
        "messages": [
            *first,
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "weight": 1},
        ]
    }


def content(*parts):
    return openai({"role": "user", "content": list(parts)})


def fault(raw, *names, **options):
    with pytest.raises(RecordFault) as caught:
        parse(raw, *names, **options)
    assert str(caught.value).isprintable()
    return caught.value


TEXT_PART, IMAGE_PART = {"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "x"}}
IN_A_ROW = "join or remove one, or pass --merge_consecutive True"
# code, turn and path: records and words
REFUSED = {
    "DATA010 -": [
        (None, "expected an object, got null"),
        ([HI], "expected an object, got a list"),
    ],
    "DATA011 -": [
        ({"id": "a"}, f'no key "conversations"; keys: [id]. {KNOWN}'),
        ({}, f'no key "conversations"; keys: []. {KNOWN}'),
        (
            {**ASK, **turns()},
            'keys of 2 formats: "conversations" (belle) and "instruction" (alpaca); pass --data_format',
        ),
    ],
    "DATA012 - conversations": [
        ({C: None}, '"conversations" is null, expected a list of turns'),
        ({C: "[]"}, '"conversations" must be a list, got a string'),
        ({C: {"0": HI[0]}}, '"conversations" must be a list, got an object'),
        ({C: []}, "conversation has no turns"),
    ],
    "DATA012 - messages": [
        ({M: 3}, '"messages" must be a list, got a number (3)'),
    ],
    "DATA012 - history": [
        ({**ASK, H: False}, '"history" must be a list of [question, answer], got a boolean'),
        ({**ASK, H: "x"}, '"history" must be a list of [question, answer], got a string'),
    ],
    "DATA013 0 conversations.0": [
        (belle("hi"), "expected an object {from, value}, got a string"),
        (belle(["human", "x"]), "expected an object {from, value}, got a list"),
    ],
    "DATA013 2 conversations.2": [
        (belle(*HI, None), "expected an object {from, value}, got null"),
    ],
    "DATA013 0 messages.0": [
        (openai("hi"), "expected an object {role, content}, got a string"),
    ],
    "DATA013 2 history.1": [
        ({**ASK, H: [["x", "y"], ["z"]]}, "expected [question, answer], got a list of 1"),
    ],
    "DATA013 0 history.0": [
        ({**ASK, H: [{"q": "x"}]}, "expected [question, answer], got an object"),
    ],
    "DATA014 0 conversations.0": [
        (belle({"value": "x"}), 'no key "from"; keys: [value]'),
        (belle({"from": "human"}), 'no key "value"; keys: [from]'),
        (belle({}), 'no key "from"; keys: []'),
    ],
    "DATA014 0 messages.0": [
        (openai({"role": "user"}), 'no key "content"; keys: [role]'),
    ],
    "DATA014 -": [
        ({"instruction": "a"}, 'no key "output"; keys: [instruction]'),
        ({"output": "a"}, 'no key "instruction"; keys: [output]'),
    ],
    "DATA015 0 conversations.0.from": [
        (said("humna"), f'unknown role "humna" - did you mean "human"? Known: {ROLES}.'),
        (said("human "), f'unknown role "human " - did you mean "human"? Known: {ROLES}.'),
        (said("      bot"), f'unknown role "      bot" - did you mean "bot"? Known: {ROLES}.'),
        (said(""), f'unknown role "". Known: {ROLES}.'),
        (said("narrator"), f'unknown role "narrator". Known: {ROLES}.'),
    ],
    "DATA016 0 conversations.0.from": [
        (said(None), f'"from" is null, expected a role: {ROLES}'),
        (said(True), f'"from" is a boolean, expected a role: {ROLES}'),
        (said(["x"]), f'"from" is a list, expected a role: {ROLES}'),
        (said(0), f'"from" is a number (0), expected a role: {ROLES}'),
    ],
    "DATA016 0 conversations.0.value": [
        (value(None), '"value" is null, expected text'),
        (value(42), '"value" is a number (42), expected text'),
        (value(True), '"value" is a boolean, expected text'),
        (value({"text": "x"}), '"value" is an object, expected text'),
        (value([]), '"value" is a list, expected text'),
        (value(["x", "y"]), '"value" is a list of strings, expected text; join them'),
    ],
    "DATA016 0 messages.0.content": [
        (
            content(TEXT_PART, IMAGE_PART),
            '"content" is a list of content parts; this model is text-only (1 text part, 1 image_url part)',
        ),
        (
            content(TEXT_PART, TEXT_PART),
            '"content" is a list of content parts; this model is text-only (2 text parts)',
        ),
        (
            content({}, {"type": 3}, "x", {"type": "\x1b[2J"}, None),
            (
                '"content" is a list of content parts; this model is text-only '
                "(2 untyped parts, 1 string part, 1 \\x1b[2J part, 1 null part)"
            ),
        ),
    ],
    "DATA016 1 messages.1.content": [
        (
            openai({"role": "user", "content": "x"}, {"role": "assistant", "content": None}),
            '"content" is null, expected text',
        ),
    ],
    "DATA016 - system": [
        (belle(system=3), '"system" is a number (3), expected text'),
        (belle(system=False), '"system" is a boolean, expected text'),
    ],
    "DATA016 - text": [
        ({"text": None}, '"text" is null, expected text'),
    ],
    "DATA016 0 instruction": [
        ({**ASK, "instruction": None}, '"instruction" is null, expected text'),
    ],
    "DATA016 0 input": [
        ({**ASK, "input": 7}, '"input" is a number (7), expected text'),
        ({**ASK, "input": 0}, '"input" is a number (0), expected text'),
    ],
    "DATA016 1 history.0.1": [
        ({**ASK, H: [["x", None]]}, '"history" is null, expected text'),
    ],
    "DATA017 0 conversations.0.value": [
        (value("x\ud83d"), "lone surrogate U+D83D - not encodable as UTF-8"),
    ],
    "DATA017 - system": [
        (belle(system="\udc00"), "lone surrogate U+DC00 - not encodable as UTF-8"),
    ],
    "DATA017 3 output": [
        ({**ASK, H: [["x", "y"]], "output": "\udfff"}, "lone surrogate U+DFFF - not encodable as UTF-8"),
    ],
    "DATA018 1 conversations.1.value": [
        (turns(("human", "a"), ("gpt", "")), f"assistant text is empty - {SILENT_ANSWER}"),
        (
            turns(("human", "a"), ("gpt", " \n\u3000")),
            f"assistant text is only white space - {SILENT_ANSWER}",
        ),
        *(
            (turns(("human", "a"), ("gpt", text)), f"assistant text is only white space - {SILENT_ANSWER}")
            for text in ("\u200b", "\ufeff\u200d", " \u200b\n\u2060")
        ),
    ],
    "DATA018 1 output": [
        ({**ASK, "output": ""}, f"assistant text is empty - {SILENT_ANSWER}"),
    ],
    "DATA019 2 conversations.2": [
        (
            turns(("human", "a"), ("gpt", "b"), ("system", "s"), ("human", "c"), ("gpt", "d")),
            "system turn after the conversation started",
        ),
        (
            turns(("human", "a"), ("gpt", "b"), ("assistant", "c")),
            f"two assistant turns in a row (turns 1-2); {IN_A_ROW}",
        ),
    ],
    "DATA019 1 conversations.1": [
        (
            turns(("human", "a"), ("human", "b"), ("gpt", "c")),
            f"two user turns in a row (turns 0-1); {IN_A_ROW}",
        ),
        (
            turns(("system", "a"), ("system", "b"), *[("human", "c"), ("gpt", "d")]),
            f"two system turns in a row (turns 0-1); {IN_A_ROW}",
        ),
        (
            turns(("system", "s"), ("gpt", "a"), ("human", "b"), ("gpt", "c")),
            "the conversation starts with the assistant, expected a user turn",
        ),
    ],
    "DATA019 0 conversations.0": [
        (
            belle({"from": "system", "value": "t"}, system="s"),
            'a system turn, and "system" stands beside the turns as well; keep one',
        ),
    ],
    "DATA020 - conversations": [
        (turns(("human", "a")), "no assistant turn - nothing to supervise"),
        (turns(("gpt", "a")), "no user turn - there is no question to learn the answer of"),
        (
            {C: [HI[0], {**HI[1], "train": False}]},
            'every assistant turn has "train": false or "weight": 0 - nothing to supervise',
        ),
    ],
    "DATA020 - text": [
        ({"text": ""}, '"text" is empty - nothing to learn'),
        ({"text": " \n\u200b"}, '"text" is empty - nothing to learn'),
    ],
    "DATA021 0 conversations.0.train": [
        (value("x", train="no"), '"train" is a string, expected true or false'),
        (value("x", train=0), '"train" is a number (0), expected true or false'),
        (value("x", train=True), '"train": true on a user turn; only assistant turns can be learnt'),
    ],
    "DATA021 0 conversations.0.weight": [
        (value("x", weight=2), '"weight" is a number (2), expected 0 or 1'),
        (value("x", weight=True), '"weight" is a boolean, expected 0 or 1'),
        (value("x", weight=1), '"weight": 1 on a user turn; only assistant turns can be learnt'),
        (value("x", train=False, weight=0), 'has both "train" and "weight", keep one'),
    ],
    "DATA022 - tools": [
        (belle(tools=[{"name": "f"}]), f'"tools" is not empty; {NO_TOOLS}'),
    ],
    "DATA022 - functions": [
        ({**openai(), "functions": [{}]}, f'"functions" is not empty; {NO_TOOLS}'),
    ],
    "DATA022 0 messages.0.tool_calls": [
        (
            openai({"role": "assistant", "content": None, "tool_calls": [{}]}),
            f'"tool_calls" is not empty; {NO_TOOLS}',
        ),
    ],
    "DATA023 0 conversations.0.role": [
        (value("x", role="user"), 'has both "from" and "role", keep one'),
    ],
    "DATA023 0 conversations.0.content": [
        (value("x", content="x"), 'has both "value" and "content", keep one'),
    ],
}
REFUSED["DATA022 0 conversations.0.from"] = [
    (said(role), f'role "{role}"; {NO_TOOLS}')
    for role in ["tool", "function", "Function_Call", "observation", "tool_response"]
]
REFUSED_CASES = [(raw, where, words) for where, cases in REFUSED.items() for raw, words in cases]

TOKENS = "text of a control token, encoded as plain text: "
NOTED = [
    (belle(), []),
    ({C: [*HI, HI[0]]}, [("DATA030 2 conversations.2", "trailing user turn dropped")]),
    (value(""), [("DATA031 0 conversations.0.value", "empty user turn")]),
    (value(" \u3000"), [("DATA031 0 conversations.0.value", "user turn of only white space")]),
    (belle(system="", tools="[]", functions=[]), []),
    (value("x <reserved_107>"), [("DATA032 0 conversations.0.value", TOKENS + "<reserved_107>")]),
    (
        turns(("human", "a"), ("gpt", "<s></s><unk></s><b>")),
        [("DATA032 1 conversations.1.value", TOKENS + "<s> </s> <unk>")],
    ),
    (value("<b>1 < 2</b> <sub> <reserved_> <S>"), []),
    (
        value("\x00\x1b[0m\u202e\t\r\n"),
        [("DATA033 0 conversations.0.value", "control characters U+0000 U+001B U+202E")],
    ),
    (
        value("\x85\x7f\u200e\u200f\u2066"),
        [("DATA033 0 conversations.0.value", "control characters U+007F U+0085 U+200E U+200F U+2066")],
    ),
    (
        value("".join(map(chr, range(9))) + "\x0b\x0c\x0e"),
        [
            (
                "DATA033 0 conversations.0.value",
                "control characters " + " ".join(f"U+{i:04X}" for i in [*range(9), 11]) + " ...",
            )
        ],
    ),
    *(
        (value(f"a\n{char}"), [("DATA033 0 conversations.0.value", f"control characters U+{ord(char):04X}")])
        for char in "\x08\x0b\x0c\x1f\x7f\x9f\u200e\u202a\u202e\u2069"
    ),
    (value("👨‍👩‍👧‍👦 ❤️ \u200b\ufeff\xa0\u2028\ue000"), []),
    (
        openai({"role": "user", "content": "</s>"}, {"role": "assistant", "content": "\x07"}),
        [
            ("DATA032 0 messages.0.content", TOKENS + "</s>"),
            ("DATA033 1 messages.1.content", "control characters U+0007"),
        ],
    ),
    (
        {C: [{"role": "user", "content": ""}, HI[1]]},
        [("DATA031 0 conversations.0.content", "empty user turn")],
    ),
    (belle(system="<s>"), [("DATA032 - system", TOKENS + "<s>")]),
    (
        {"instruction": "", "input": "", "output": "<s>", "history": [["\x00", "b"]]},
        [
            ("DATA033 0 history.0.0", "control characters U+0000"),
            ("DATA031 2 instruction", "empty user turn"),
            ("DATA032 3 output", TOKENS + "<s>"),
        ],
    ),
    ({**ASK, "input": "<s>"}, [("DATA032 0 input", TOKENS + "<s>")]),
    ({**ASK, "instruction": "", "input": " "}, [("DATA031 0 input", "user turn of only white space")]),
    (
        {"text": "<unk>\x00"},
        [("DATA032 - text", TOKENS + "<unk>"), ("DATA033 - text", "control characters U+0000")],
    ),
]


def place(found, raw):
    """As "DATA016 0 conversations.0.value": code, turn, and the path, which is there in the record."""
    for step in found.at:
        raw = raw[step]
    turn = "-" if found.turn is None else found.turn
    return f"{found.code} {turn} {'.'.join(map(str, found.at))}".rstrip()


@pytest.mark.parametrize("raw, where, words", REFUSED_CASES)
def test_refused_with_code_place_and_words(raw, where, words):
    found = fault(raw)
    assert (place(found, raw), found.text) == (where, words)
    assert CODES[found.code][0] == "ERROR"


@pytest.mark.parametrize("raw, expected", NOTED)
def test_noted_with_code_place_and_words(raw, expected):
    notes = parse(raw)[1]
    assert [(place(note, raw), note.text) for note in notes] == expected
    assert all(CODES[note.code][0] != "ERROR" and str(note).isprintable() for note in notes)


def test_every_code_about_records_is_tested():
    tested = [*REFUSED, *(where for _, notes in NOTED for where, _ in notes)]
    # joined turns are tested below, duplicates are a matter of files
    assert {where.split()[0] for where in tested} | {"DATA034", "DATA035"} == RECORD_CODES


def test_samples_cover_the_table():
    assert SAMPLES.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("raw", [None, [], "x", 3, True])
def test_every_format_refuses_what_is_not_an_object(name, raw):
    assert fault(raw, name).text.startswith("expected an object, got ")


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_names_the_key_it_misses(name):
    found = fault({"id": 1}, name)
    assert (found.code, found.text) == ("DATA011", f'no key "{FORMATS[name].keys[0]}"; keys: [id]. {KNOWN}')


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_told_from_its_keys(name):
    raw, tally = SAMPLES[name]("q", "a"), Counter()
    assert parse(raw, tally=tally) == parse(raw, name) == (messages_of(name, "q", "a"), [])
    assert tally[f"format:{'belle' if name == 'sharegpt' else name}"] == 1


def messages_of(name, question, answer):
    if name == "text":
        return [Message("text", answer)]
    return [Message("user", question), Message("assistant", answer)]


TEXTS = st.text(st.characters(codec="utf-8"), min_size=1) | st.sampled_from(
    [" a\n", "{x} %s {{ y }}", "<b>$\\frac{1}{2}$</b>", "</s><reserved_107>", "\u2028\x00", "\r\n\ufeff"]
)


@pytest.mark.parametrize("name", FORMATS)
@given(question=TEXTS, answer=TEXTS.filter(lambda text: not is_blank(text)))
def test_texts_are_left_as_they_are(name, question, answer):
    raw = SAMPLES[name](question, answer)
    assert parse(raw)[0] == messages_of(name, question, answer)
    assert parse(json.loads(json.dumps(raw)))[0] == messages_of(name, question, answer)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["human", "gpt"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from("from value role content train weight".split()), inner)
        | st.dictionaries(
            st.sampled_from([C, M, H, "instruction", "input", "output", "system", "text"]), inner
        )
    ),
    max_leaves=12,
)


@given(
    raw=JSON
    | st.builds(turns, st.tuples(JSON, JSON), st.tuples(JSON, JSON))
    | st.fixed_dictionaries({"instruction": JSON, "input": JSON, "output": JSON, H: JSON, "system": JSON}),
    merge=st.booleans(),
)
def test_any_json_is_parsed_or_refused_with_a_place(raw, merge):
    try:
        messages, notes = parse(raw, merge_consecutive=merge, tally=Counter())
    except RecordFault as found:
        messages, notes = [Message("text", "x")], [found]
    assert all(type(message.text.encode()) is bytes for message in messages)
    assert all(place(note, raw) and str(note).isprintable() for note in notes)


def test_unknown_format_is_suggested():
    with pytest.raises(UserError, match="unknown data format 'shargpt', did you mean 'sharegpt'"):
        parse(belle(), "shargpt")


@pytest.mark.parametrize("data_format", ["belle", "messages"])
def test_a_declared_format_settles_two(data_format):
    raw = turns(("human", "a"), ("gpt", "b"), messages=openai()[M])
    assert fault(raw).text == (
        'keys of 2 formats: "conversations" (belle) and "messages" (messages); pass --data_format'
    )
    tally = Counter()
    assert parse(raw, data_format, tally=tally)[0] == messages_of("belle", "a", "b")
    assert tally[f"key:{M if data_format == 'belle' else C}"] == 1


def test_text_beside_the_keys_of_another_format_is_not_read():
    tally = Counter()
    assert parse({**ASK, "text": "all of it"}, tally=tally)[0] == messages_of("alpaca", "a", "b")
    assert tally["key:text"] == 1


@pytest.mark.parametrize("user", ["human", "user", "用户", "Human", "USER"])
@pytest.mark.parametrize("assistant", ["gpt", "assistant", "bot", "助手", "GPT"])
@pytest.mark.parametrize("system", ["system", "developer", "System"])
def test_role_aliases(user, assistant, system):
    messages, notes = parse(turns((system, "s"), (user, "a"), (assistant, "b")))
    assert messages == [Message("system", "s"), Message("user", "a"), Message("assistant", "b")]
    assert notes == []


@pytest.mark.parametrize("key, off, on", [("train", False, True), ("weight", 0, 1), ("weight", 0.0, None)])
def test_train_is_read_per_turn(key, off, on):
    raw = turns(("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"))
    raw[C][0][key] = off
    raw[C][1][key] = off
    raw[C][3][key] = on
    assert [message.train for message in parse(raw)[0]] == [False, False, True, True]


def test_system_beside_the_turns_is_no_turn():
    messages, notes = parse(belle(*HI, {"from": "human", "value": ""}, HI[1], system="s"))
    assert [message.role for message in messages] == ["system", *["user", "assistant"] * 3]
    assert [(note.code, note.turn) for note in notes] == [("DATA031", 2)]
    assert fault(turns(("human", "a"), ("human", "b"), system="s")).turn == 1


def test_alpaca_history_comes_first_and_is_trained():
    raw = {"instruction": "i", "input": "x", "output": "o", H: [["q", "a"], ["r", "b"]], "system": "s"}
    expected = [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    assert parse(raw)[0] == [Message(*pair) for pair in [*expected, ("user", "i\nx"), ("assistant", "o")]]
    for empty in (None, ""):
        raw = {"instruction": "i", "input": empty, "output": "o", H: [], "system": empty}
        assert parse(raw)[0] == messages_of("alpaca", "i", "o")


def test_alpaca_input_stands_alone_without_an_instruction():
    raw = {"instruction": "", "input": "x", "output": "o"}
    assert parse(raw) == (messages_of("alpaca", "x", "o"), [])


def test_merge_joins_turns_of_one_role():
    raw = turns(("system", "s"), ("human", "a"), ("user", "b"), ("gpt", "c"), ("gpt", "d"), ("gpt", "e"))
    raw[C] += [HI[0], HI[1], HI[0], HI[0]]
    raw[C][4]["train"] = False
    messages, notes = parse(raw, merge_consecutive=True)
    because = "; none of it is learnt, because turn 4 is not"
    assert messages == [
        Message("system", "s"),
        Message("user", "a\nb"),
        Message("assistant", "c\nd\ne", train=False),
        Message("user", "a"),
        Message("assistant", "b"),
    ]
    assert [(note.code, note.turn, note.at, note.text) for note in notes] == [
        ("DATA035", 1, (C, 1), "2 user turns in a row joined (turns 1-2)"),
        ("DATA035", 3, (C, 3), f"3 assistant turns in a row joined (turns 3-5){because}"),
        ("DATA035", 8, (C, 8), "2 user turns in a row joined (turns 8-9)"),
        ("DATA030", 8, (C, 8), "trailing user turn dropped"),
    ]


def test_merge_says_places_of_the_file():
    found = fault(
        turns(("human", "a"), ("human", "b"), ("gpt", "c"), ("system", "d")), merge_consecutive=True
    )
    assert (found.code, found.turn, found.at) == ("DATA019", 3, (C, 3))
    assert parse(belle(), merge_consecutive=True) == parse(belle())


def test_tally_counts_what_is_accepted():
    tally = Counter()
    raw = turns(("Human", "a"), ("gpt", "b"), ("human", "c"), id=1, system="s", 备注="x")
    raw[C][1] |= {"train": True, "score\x1b": 3}
    parse(raw, tally=tally)
    parse(
        {M: [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "x"}]},
        tally=tally,
    )
    parse({"text": "x", "lang": "zh"}, tally=tally)
    for bad in ({"id": 1}, said("x"), turns(("gpt", "a"))):
        with pytest.raises(RecordFault):
            parse(bad, tally=tally)
    roles = {"role:Human": 1, "role:human": 1, "role:gpt": 1, "role:user": 1, "role:assistant": 1}
    formats = {"format:belle": 1, "format:messages": 1, "format:text": 1}
    keys = {"key:备注": 1, "key:score\\x1b": 1, "key:name": 1}
    assert tally == {"turns": 6, **roles, **formats, **keys}


def test_names_of_keys_take_little_room():
    tally = Counter()
    for number in range(1000):
        parse(turns(("human", "a"), ("gpt", "b"), known=1, **{f"k{number}": 1}), tally=tally)
    assert len(tally) == MAX_NAMES + 1
    others = {"turns", "format:belle", "role:human", "role:gpt", "key:known", "key:..."}
    assert tally["key:known"] == 1000 == tally["key:..."] + len(tally.keys() - others)
    merged = Counter()
    for part in (tally, Counter({"key:new": 2, "role:new": 3, "key:k0": 1})):
        for name, number in part.items():
            count_name(merged, name, number)
    assert merged == tally + Counter({"key:...": 2, "role:new": 3, "key:k0": 1})


def test_roles_are_counted_in_the_order_of_the_file():
    tally = Counter()
    parse(turns(("system", "s"), *[("用户", "a"), ("bot", "b"), ("human", "a"), ("gpt", "b")]), tally=tally)
    roles = [name for name in tally if name.startswith("role:")]
    assert roles == ["role:system", "role:用户", "role:bot", "role:human", "role:gpt"]


def test_check_order_takes_messages():
    check_order([Message("user", "a"), Message("assistant", "b"), Message("user", "c")])
    with pytest.raises(RecordFault, match="turn 1: two user turns in a row") as caught:
        check_order([Message("user", "a"), Message("user", "b")])
    assert caught.value.at == ("turns", 1)


def test_terminal_controls_are_escaped_in_messages():
    found = fault(turns(("\x1b[31mhuman\u202e" + "x" * 200, "a"), ("gpt", "b")))
    assert "\\x1b[31mhuman\\u202e" in str(found) and len(str(found)) < 250
    assert "[\\x07, k0," in fault({"\x07": 1} | {f"k{i}": i for i in range(50)}).text
    assert [escaped(char) for char in "a中 \n\u3000\ud83d"] == ["a", "中", " ", "\\n", "\\u3000", "\\ud83d"]


def shipped(name):
    text = (ROOT / "data" / name).read_text(encoding="utf-8")
    return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]


SHIPPED = {
    "belle_chat.json": ("belle", 70),
    "belle_chat.jsonl": ("belle", 6),
    "belle_persona.json": ("belle", 4),
    "messages_chat.jsonl": ("messages", 5),
    "alpaca.json": ("alpaca", 5),
    "text.jsonl": ("text", 4),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_samples_are_clean(name):
    data_format, num = SHIPPED[name]
    tally = Counter()
    assert [note for raw in shipped(name) for note in parse(raw, tally=tally)[1]] == []
    assert tally[f"format:{data_format}"] == num == len(shipped(name))
    assert not [key for key in tally if key.startswith("key:")]


def test_shipped_questions_have_one_answer():
    answers = {}
    for raw in shipped("belle_chat.json"):
        messages, _ = parse(raw)
        for question, answer in zip(messages[::2], messages[1::2]):
            assert answers.setdefault(question.text, answer.text) == answer.text
    assert len(answers) == 62


@needs_shared
def test_real_records_are_accepted():
    records = json.loads((SHARED / "data" / "smile_belle_valid500.json").read_text(encoding="utf-8"))
    for raw in records:
        messages, notes = parse(raw)
        assert [m.text for m in messages] == [turn["value"] for turn in raw[C]]
        assert {note.code for note in notes} <= {"DATA033"}
