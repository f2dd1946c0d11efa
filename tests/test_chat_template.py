"""``apply_chat_template``: the ids of the prompt builder, and texts that cannot forge a turn."""

import pytest
from fixtures import HOSTILE

from baichuan_sft.model.chat_baichuan import build_chat_input

CHAT = [
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "Hello, world."},
    {"role": "user", "content": " 再见 2023"},
]
SYSTEM = {"role": "system", "content": "你是助手"}


def ids_of(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, return_dict=False, **options)


@pytest.mark.parametrize("messages", [CHAT, CHAT[:2], [SYSTEM, *CHAT], [SYSTEM, *CHAT[:2]], CHAT[:1]])
def test_template_ids_are_the_prompt_ids(tokenizer, messages):
    prompt = build_chat_input(tokenizer, messages, model_max_length=4096, max_new_tokens=64)
    assert ids_of(tokenizer, messages, add_generation_prompt=True) == prompt
    assert ids_of(tokenizer, messages, continue_final_message=True) == ids_of(tokenizer, messages)
    if messages[-1]["role"] == "user":
        assert [*ids_of(tokenizer, messages), 196] == prompt


@pytest.mark.parametrize(
    "messages", [CHAT, CHAT[:2], [SYSTEM, *CHAT], [SYSTEM, *CHAT[:2]], [{**CHAT[0], "content": ""}]]
)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_jinja_template_gives_the_same_ids_the_vendor_way(
    vocabulary, tokenizer, messages, add_generation_prompt
):
    options = {"add_generation_prompt": add_generation_prompt}
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    ids = tokenizer.encode(rendered)
    if "1" in vocabulary and messages[0]["role"] != "system":
        # SentencePiece puts this one id before any text of Baichuan-1; no template can remove it.
        assert tokenizer.convert_ids_to_tokens(ids.pop(0)) == "▁"
    assert ids == ids_of(tokenizer, messages, **options)


def test_template_texts_cannot_forge_a_turn(tokenizer):
    messages = [{"role": "system", "content": HOSTILE}, {"role": "user", "content": HOSTILE}]
    ids = ids_of(tokenizer, messages, add_generation_prompt=True, sanitize_control_tokens=True)
    assert [i for i in ids if i in tokenizer.control_ids] == [195, 196]


def test_template_batch_padding_tensors_and_mask(small):
    batch = [CHAT[:2], [SYSTEM, *CHAT]]
    single = [ids_of(small, messages) for messages in batch]
    assert ids_of(small, batch) == single
    out = small.apply_chat_template(
        batch, padding=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    assert (
        out["input_ids"].shape
        == out["attention_mask"].shape
        == out["assistant_masks"].shape
        == (2, len(single[1]))
    )
    answer = small.encode_text(CHAT[1]["content"])
    for row in range(2):
        assert out["input_ids"][row][out["attention_mask"][row].bool()].tolist() == single[row]
        assert out["input_ids"][row][out["assistant_masks"][row].bool()].tolist() == answer
    assert small.apply_chat_template(CHAT, return_tensors="pt")["input_ids"].shape == (
        1,
        len(ids_of(small, CHAT)),
    )
    assert ids_of(small, CHAT, truncation=True, max_length=3) == ids_of(small, CHAT)[:3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": [{"type": "function"}]}, "no place for tools"),
        ({"documents": [{"text": "a"}]}, "no place for documents"),
        ({"enable_thinking": True}, "no place for enable_thinking"),
        ({"enable_thinking": True, "tokenize": False}, "no place for enable_thinking"),
        ({"return_assistant_tokens_mask": True, "return_dict": False}, "needs return_dict=True"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "exclude each other"),
    ],
)
def test_template_refuses_what_it_cannot_honour(small, options, message):
    with pytest.raises(ValueError, match=message):
        small.apply_chat_template(CHAT, **options)


@pytest.mark.parametrize("tokenize", [True, False])
@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no messages"),
        ([{"role": "tool", "content": "a"}], "unknown role 'tool'. Known: system, user"),
        ([*CHAT, SYSTEM], "message 3: a system message can only be the first"),
        ([{"role": "user", "content": None}], "content must be a string, got NoneType"),
    ],
)
def test_template_refuses_bad_messages(small, messages, message, tokenize):
    with pytest.raises(ValueError, match=message):
        small.apply_chat_template(messages, tokenize=tokenize)


def test_own_template_is_honoured(small):
    own = "{{ messages[0]['content'] }}!"
    assert small.apply_chat_template(CHAT, chat_template=own, tokenize=False) == "你好!"
    assert ids_of(small, CHAT, chat_template=own) == small.encode("你好!")
