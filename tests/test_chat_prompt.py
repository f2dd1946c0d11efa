"""Prompts against the vendor's two builders, and the behaviour of chat()."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from fixtures import SMALL_VOCABULARY, VOCABULARIES, rows, tiny_config
from transformers import GenerationConfig

from baichuan_sft.model.chat_baichuan import ChatMixin, build_chat_input, build_chat_input_v1
from baichuan_sft.model.modeling_baichuan import BaichuanForCausalLM
from baichuan_sft.model.tokenization_baichuan import BaichuanTokenizer

TOKENIZER = BaichuanTokenizer(SMALL_VOCABULARY)
# golden key -> (builder, whose vocabulary)
BUILDERS = {
    "baichuan2": (build_chat_input, "baichuan2"),
    "baichuan13b_v1": (build_chat_input_v1, "baichuan1"),
    "baichuan13b_v2": (build_chat_input, "baichuan1"),
}
# rows that are equal, that are errors, that hold a control literal; 59 in all
COUNTS = {"baichuan2": (56, 2, 1), "baichuan13b_v1": (44, 14, 1), "baichuan13b_v2": (56, 2, 1)}
LITERALS = ("<s>", "</s>", "<unk>", "<reserved_")
HELLO = [{"role": "user", "content": "你好"}]


def vendor_rows(vocabulary):
    return rows(
        "small_tok/build_chat_input.jsonl" if vocabulary.endswith("_like") else "chat/build_chat_input.jsonl"
    )


@pytest.mark.parametrize("key", BUILDERS)
@pytest.mark.parametrize("suffix", ["_like", ""])
def test_prompt_equals_the_vendor(key, suffix):
    build, vocabulary = BUILDERS[key]
    path = VOCABULARIES[vocabulary + suffix]
    if not path.exists():
        pytest.skip(f"needs the vendor's vocabulary {path}")
    tokenizer = BaichuanTokenizer(path)
    equal = errors = literals = 0
    for row in vendor_rows(vocabulary + suffix):
        room = {
            "model_max_length": row["model_max_length"],
            "max_new_tokens": row["max_new_tokens"] or row["default_max_new_tokens"],
        }
        roles = {message["role"] for message in row["messages"]}
        # Wider than the vendor's errors: it writes an unknown role as the assistant's, and v1 sees a system
        # message only where the rounds reach back to it.
        known = {"user", "assistant"} if build is build_chat_input_v1 else {"system", "user", "assistant"}
        if "error" in row[key] or not roles <= known or not roles:
            with pytest.raises(ValueError, match=r"^(message \d+: .*|the conversation has no messages.*)$"):
                build(tokenizer, row["messages"], **room)
            errors += 1
        elif any(literal in message["content"] for message in row["messages"] for literal in LITERALS):
            ids = build(tokenizer, row["messages"], **room)
            forged = [i for i in ids if i in tokenizer.control_ids - {195, 196}]
            assert set(forged) <= ({2} if build is build_chat_input_v1 else set())
            assert sum(i in (195, 196) for i in ids) <= len(row["messages"]) + 1
            literals += 1
        else:
            assert build(tokenizer, row["messages"], **room) == row[key]["input_ids"]
            equal += 1
    assert (equal, errors, literals) == COUNTS[key]


def test_role_aliases_are_the_roles():
    room = {"model_max_length": 128, "max_new_tokens": 8}
    plain = build_chat_input(TOKENIZER, [*HELLO, {"role": "assistant", "content": "a"}, *HELLO], **room)
    for user, assistant in (("human", "gpt"), ("Human", "assistant")):
        aliased = [{"role": user, "content": "你好"}, {"role": assistant, "content": "a"}]
        assert build_chat_input(TOKENIZER, [*aliased, aliased[0]], **room) == plain


class Scripted(ChatMixin):
    """Generates given ids the way transformers does, until one is an eos or it is told to stop."""

    device = torch.device("cpu")
    pause = 0.0

    def __init__(self, ids, context_length=128, fail_after=None, obeys_eos=True):
        self.ids, self.fail_after, self.obeys_eos = ids, fail_after, obeys_eos
        self.config = SimpleNamespace(context_length=context_length)
        self.generation_config = GenerationConfig(max_new_tokens=32, eos_token_id=2)
        self.used, self.steps = None, 0

    def generate(self, input_ids, generation_config, attention_mask, streamer=None, stopping_criteria=()):
        self.used = generation_config
        assert attention_mask.shape == input_ids.shape
        if streamer:
            streamer.put(input_ids)
        for token_id in self.ids:
            if self.steps == self.fail_after:
                raise RuntimeError("device lost")
            self.steps += 1
            input_ids = torch.cat([input_ids, torch.tensor([[token_id]])], dim=1)
            if streamer:
                streamer.put(torch.tensor([token_id]))
            ended = self.obeys_eos and token_id in generation_config.eos_token_id
            if ended or any(criterion(input_ids, None).all() for criterion in stopping_criteria):
                break
            time.sleep(self.pause)
        if streamer:
            streamer.end()
        return input_ids


@pytest.mark.parametrize("vocabulary", ["baichuan1", "baichuan2"])
def test_stream_yields_what_the_vendor_yields(vocabulary):
    if not VOCABULARIES[vocabulary].exists():
        pytest.skip(f"needs the vendor's vocabulary {VOCABULARIES[vocabulary]}")
    tokenizer = BaichuanTokenizer(VOCABULARIES[vocabulary])
    golds = [row[vocabulary] for row in rows("tokenizer/stream.jsonl")]
    golds = [gold for gold in golds if 195 not in gold["ids"]]  # the vendor shows it, here it ends the answer
    for gold in golds:
        model = Scripted(gold["ids"], obeys_eos=False)  # some of the recorded ids hold an eos inside
        assert list(model.chat(tokenizer, HELLO, stream=True)) == gold["yields"]
        assert model.chat(tokenizer, HELLO) == gold["yields"][-1]
    assert len(golds) == {"baichuan1": 24, "baichuan2": 23}[vocabulary]


def test_answer_ends_at_eos_and_where_the_user_would_speak():
    text = TOKENIZER.encode_text(" 好 ")
    for stop in (2, 195):
        model = Scripted([*text, stop, 196])
        assert model.chat(TOKENIZER, HELLO) == " 好 "  # not stripped
        assert model.used.eos_token_id == [2, 195]
        assert list(Scripted([*text, stop, 196]).chat(TOKENIZER, HELLO, stream=True))[-1] == " 好 "


def test_generation_options_reach_generate():
    model = Scripted([2])
    own = GenerationConfig(max_new_tokens=5, eos_token_id=[7])
    model.chat(TOKENIZER, HELLO, generation_config=own, temperature=0.5)
    assert (model.used.max_new_tokens, model.used.temperature, model.used.eos_token_id) == (
        5,
        0.5,
        [2, 7, 195],
    )
    assert own.eos_token_id == [7]
    model.chat(TOKENIZER, HELLO, generation_config=GenerationConfig(max_new_tokens=500))
    assert model.used.max_new_tokens == 64  # half of the context, so that a prompt fits
    model = Scripted([2], context_length=4096)
    model.chat(TOKENIZER, HELLO, generation_config=GenerationConfig())
    assert model.used.max_new_tokens == 2048


def test_an_error_in_the_thread_is_raised_to_the_reader():
    model = Scripted(TOKENIZER.encode_text("123456"), fail_after=2)
    seen = []
    with pytest.raises(RuntimeError, match="device lost"):
        for text in model.chat(TOKENIZER, HELLO, stream=True):
            seen.append(text)
    assert seen == ["1", "12"]


def test_bad_messages_fail_at_the_call_not_in_the_stream():
    with pytest.raises(ValueError, match="unknown role 'tool'"):
        Scripted([2]).chat(TOKENIZER, [{"role": "tool", "content": "a"}], stream=True)


def test_closing_the_stream_stops_generation():
    threads = threading.active_count()
    model = Scripted([1000] * 10_000)
    model.pause = 0.001
    stream = model.chat(TOKENIZER, HELLO, stream=True)
    next(stream)
    stream.close()
    assert threading.active_count() <= threads
    assert model.steps < 1000


@pytest.mark.parametrize("arch", ["baichuan2-7b", "baichuan2-13b"])
def test_a_real_model_streams_what_it_answers(arch):
    torch.manual_seed(0)
    model = BaichuanForCausalLM(tiny_config(arch)).eval()
    options = {"do_sample": False, "max_new_tokens": 12}
    answer = model.chat(TOKENIZER, HELLO, **options)
    states = list(model.chat(TOKENIZER, HELLO, stream=True, **options))
    assert states[-1] == answer != ""
    assert 1 < len(states) <= 12
    stream = model.chat(TOKENIZER, HELLO, stream=True, **options)
    assert next(stream) == states[0]
    stream.close()
