"""Batches with shared beginnings against one request at a time, and against lm-eval's own model."""

import copy
import random
from array import array
from dataclasses import replace

import pytest
import torch
from fixtures import HOSTILE, tiny_config

from baichuan_sft import BaichuanForCausalLM
from baichuan_sft.errors import NumericalFault
from baichuan_sft.evaluate.beginnings import STEP, beginnings
from baichuan_sft.evaluate.generation import Row
from baichuan_sft.evaluate.items import Request, letter
from baichuan_sft.evaluate.scorer import Scorer

# fp32 sums in another order: what a batch, a cache and another shape of the products change.
SLACK = 2e-5
ARCHES = ["baichuan2-7b", "baichuan-13b"]  # both position embeddings, both heads


@pytest.fixture(scope="module")
def models():
    """One per position embedding and head; scaled up, so that scores differ by more than the slack."""
    made = {}
    for arch in ARCHES:
        torch.manual_seed(1)
        position = {"max_position_embeddings": 1024} if "7b" in arch else {"model_max_length": 1024}
        model = BaichuanForCausalLM(tiny_config(arch, **position)).eval().requires_grad_(False)
        for weight in model.model.layers.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
        made[arch] = model
    return made


def questions(**more) -> list[Request]:
    """Two subjects with shots, one without, in no order; prompts of many lengths."""
    draw = random.Random(0)
    words = "the sea is deep 水 很 深 and 42 ships sail on it at night 吗 ？".split()

    def text(number):
        return " ".join(draw.choices(words, k=number))

    heads = [f"{text(90)}\n", f"{text(60)}\n", ""]
    texts = [f"{head}{text(draw.randint(3, 40))}\nAnswer:" for head in heads for _ in range(5)]
    draw.shuffle(texts)
    return [Request(text, **more) for text in texts]


def in_batches(scorer, requests):
    plan = scorer.plan(requests)
    assert sorted(i for batch in plan for i in batch) == list(range(len(requests)))
    found = {}
    for batch in plan:
        found |= dict(zip(batch, scorer.run([requests[i] for i in batch])))
    return [found[i] for i in range(len(requests))]


def log_probabilities(model, ids):
    return model(torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)


KINDS = {
    "logit": dict(choices=("A", "B", "C", "D"), by="logit"),
    "letters": dict(choices=(" A", " B", " C", " D"), by="loglikelihood"),
    "words": dict(choices=(" the sea", " the sea at night", " 深", " 42 ships"), by="loglikelihood"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ARCHES)
def test_scores_are_those_of_one_request_at_a_time(models, small, arch, kind):
    model, tokenizer, requests = models[arch], small, questions(**KINDS[kind])
    scorer = Scorer(model, tokenizer, batch_tokens=400)
    found = in_batches(scorer, requests)
    assert {shared > STEP for shared in scorer._shared.values()} == {True, False}  # both are tried
    for request, response in zip(requests, found):
        prompt = tokenizer.encode_text(request.text)
        expected = []
        for choice in request.choices:
            if kind == "logit":
                (token,) = tokenizer.encode_text(choice)
                expected.append(model(torch.tensor([prompt])).logits[0, -1, token].item())
            else:
                ids = tokenizer.encode_text(request.text + choice)
                assert ids[: len(prompt)] == prompt
                rows = log_probabilities(model, ids[:-1])[len(prompt) - 1 :]
                expected.append(rows.gather(1, torch.tensor(ids[len(prompt) :])[:, None]).sum().item())
        assert response.scores == pytest.approx(expected, abs=SLACK)
        assert letter(response.scores) == letter(expected)
        assert response.prompt_tokens == len(prompt)
    first = [response.scores[0] for response in found]
    assert max(first) - min(first) > 1e3 * SLACK  # a row answered for another would be seen


@pytest.mark.parametrize("kind", ["letters", "words"])
def test_log_likelihoods_are_lm_evals(models, small, kind):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    model = models["baichuan2-7b"]
    requests = [*questions(**KINDS[kind]), Request("ends in a space ", **KINDS[kind])]
    theirs = huggingface.HFLM(
        pretrained=model, tokenizer=small, backend="causal", batch_size=4, max_length=1024
    )
    calls = [
        Instance("loglikelihood", {}, (request.text, choice), i)
        for i, request in enumerate(requests)
        for choice in request.choices
    ]
    expected = iter([score for score, _ in theirs.loglikelihood(calls, disable_tqdm=True)])
    for response in in_batches(Scorer(model, small, batch_tokens=400), requests):
        assert response.scores == pytest.approx([next(expected) for _ in response.scores], abs=SLACK)


def one_by_one(model, tokenizer, request, chat=False):
    """Greedy ids without a cache."""
    prompt = tokenizer.encode_text(request.text)
    prompt = [195, *prompt, 196] if chat else prompt
    ids = []
    while len(ids) < request.max_new_tokens and (not ids or ids[-1] not in ((2, 195) if chat else (2,))):
        ids.append(int(model(torch.tensor([prompt + ids])).logits[0, -1].argmax()))
    return prompt, ids


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("arch", ARCHES)
def test_greedy_answers_are_those_of_one_request_at_a_time(models, small, arch, chat):
    model, requests = models[arch], questions(max_new_tokens=5)[:14]
    found = in_batches(Scorer(model, small, batch_tokens=900, chat=chat), requests)
    for request, response in zip(requests, found):
        prompt, ids = one_by_one(model, small, request, chat)
        shown = small.decode([i for i in ids if i not in (2, 195)], skip_special_tokens=True)
        assert response.texts[0].strip() == shown.strip()
        assert (response.prompt_tokens, response.tokens) == (len(prompt), len(prompt) + len(ids))


# --- batches ----------------------------------------------------------------------------------------------


def test_beginnings_by_hand():
    """Long enough to be worth a pass: each letter stands for 40 ids."""

    def row(text):
        return array("i", [ord(c) for c in text for _ in range(40)])

    rows = sorted(map(row, ["abc1", "abc2", "abd3", "abd4", "abd5", "x", "y", "abd5"]))
    texts = ["".join(chr(i) for i in one[::40]) for one in rows]
    found = {texts[group[0]][: shared // 40]: [texts[i] for i in group] for group, shared in beginnings(rows)}
    # "abc" apart would cost 120 ids to save 2 * 40; "abd" for four rows saves 160. The last id is not shared.
    assert found == {"": ["x", "y"], "ab": ["abc1", "abc2"], "abd": ["abd3", "abd4", "abd5", "abd5"]}
    assert sum(len(group) for group, _ in beginnings(rows)) == len(rows)
    assert beginnings([row("same")] * 3) == [([0, 1, 2], 159)]
    assert beginnings([]) == []


def test_beginnings_are_shared_and_save():
    draw = random.Random(0)
    for _ in range(30):
        rows = [array("i", [draw.randint(0, 1)] * 50 + [draw.randint(0, 1)] * 60 + [i]) for i in range(12)]
        rows = sorted(row[: draw.randint(1, 111)] for row in rows)
        found = beginnings(rows)
        assert sorted(i for group, _ in found for i in group) == list(range(len(rows)))
        for group, shared in found:
            assert all(rows[i][:shared] == rows[group[0]][:shared] and len(rows[i]) > shared for i in group)
        computed = sum(shared + sum(len(rows[i]) - shared for i in group) for group, shared in found)
        assert computed <= sum(map(len, rows))


def test_the_plan_follows_from_the_requests_alone(models, small):
    requests = questions(**KINDS["logit"]) + questions(max_new_tokens=4)
    used = Scorer(models["baichuan2-7b"], small, batch_tokens=300)
    used.plan(questions(**KINDS["words"]))
    plan = used.plan(requests)
    assert plan == Scorer(models["baichuan2-7b"], small, batch_tokens=300).plan(requests)
    for batch in plan:
        assert len({not requests[i].choices for i in batch}) == 1
        (shared,) = {used._shared[requests[i]] for i in batch}
        shared -= requests[batch[0]].max_new_tokens  # what is held counts, and the answer with it
        longest = max(len(used.encode(requests[i])) for i in batch) - shared
        assert len(batch) == 1 or longest * len(batch) <= 300


def test_a_batch_has_the_same_bits_after_others_or_alone(models, small):
    """As a resumed run asks them."""
    requests = questions(**KINDS["letters"])
    first, second = (Scorer(models["baichuan-13b"], small, batch_tokens=300) for _ in range(2))
    plan = first.plan(requests)
    assert second.plan(requests) == plan and len(plan) > 4
    straight = [first.run([requests[i] for i in batch]) for batch in plan]
    for batch, expected in reversed(list(zip(plan, straight))):
        assert second.run([requests[i] for i in batch]) == expected


def test_what_requests_share_is_read_once(models, small, monkeypatch):
    model, requests = models["baichuan2-7b"], questions(**KINDS["letters"])
    scorer, read = Scorer(model, small, batch_tokens=10_000), []
    forward = type(model.model).forward

    def counted(self, input_ids, **options):
        read.append(input_ids.numel())
        return forward(self, input_ids, **options)

    monkeypatch.setattr(type(model.model), "forward", counted)
    in_batches(scorer, requests)
    prompts = {tuple(scorer.encode(request)) for request in requests}
    heads = {tuple(scorer.encode(request)[: scorer._shared[request]]) for request in requests}
    suffixes = sum(len(prompt) for prompt in prompts) - sum(scorer._shared[request] for request in requests)
    assert len(heads) == 3 and sum(map(len, heads)) > 100
    # Each beginning once, one row a question for its four letters; padding adds at most as much again.
    assert sum(map(len, heads)) + suffixes <= sum(read) < sum(map(len, heads)) + 2 * suffixes


def test_logits_in_parts_are_the_same(models, small, monkeypatch):
    requests = questions(**KINDS["words"])
    expected = in_batches(Scorer(models["baichuan2-7b"], small), requests)
    monkeypatch.setattr("baichuan_sft.evaluate.scorer.POSITIONS", 7)
    for ours, whole in zip(in_batches(Scorer(models["baichuan2-7b"], small), requests), expected):
        assert ours.scores == pytest.approx(whole.scores, abs=SLACK)


# --- answers ----------------------------------------------------------------------------------------------


def test_a_stop_string_ends_its_own_row_alone(models, small):
    scorer, requests = Scorer(models["baichuan2-7b"], small), questions(max_new_tokens=12)[:6]
    whole = [response.texts[0] for response in in_batches(scorer, requests)]
    stop = whole[0][len(whole[0]) // 2 :][:3]
    assert stop and any(stop not in text for text in whole)
    stopped = in_batches(scorer, [replace(request, stop=("\0never", stop)) for request in requests])
    for text, response in zip(whole, stopped):
        assert response.texts[0] == text.partition(stop)[0]
    assert stopped[0].tokens < len(scorer.encode(requests[0])) + 12


def test_an_answer_keeps_the_indentation_that_it_begins_with(tokenizer):
    """Baichuan-1's pieces begin with a space, which decoding an answer by itself takes away."""
    head, body = "def f():\n", "    return 1\n\nprint(f())\n# 完\n"
    ids = tokenizer.encode_text(head + body)
    prompt = tokenizer.encode_text(head)
    assert ids[: len(prompt)] == prompt
    for stop in ((), ("\nprint",), ("\n# ", "\nprint")):
        row = Row(Request(head, stop=stop, max_new_tokens=99), prompt, 0, tokenizer, chat=False)
        for token in [*ids[len(prompt) :], 2]:
            row.take(torch.zeros(0), token)
            if row.done:
                break
        assert row.done and row.text() == (body.partition("\nprint")[0] if stop else body)
        assert (row.ids[-1] == 2) == (not stop)  # it went no further than the stop string


def test_samples_follow_from_the_seed(models, small):
    requests = questions(max_new_tokens=6, samples=3, temperature=1.0)[:4]
    scorer = Scorer(models["baichuan-13b"], small)

    def drawn(seed, **more):
        torch.manual_seed(seed)
        return [r.texts for r in in_batches(scorer, [replace(request, **more) for request in requests])]

    assert drawn(1) == drawn(1) != drawn(2)
    assert all(len(set(texts)) > 1 for texts in drawn(1))
    # Colder than the gaps between logits it is greedy.
    assert drawn(1, temperature=1e-4) == [texts * 3 for texts in drawn(1, temperature=0.0, samples=1)]
    longest = max(map(scorer.length, requests))
    few = Scorer(models["baichuan-13b"], small, batch_tokens=longest)  # a sample at a time
    alone = []
    for one in (few, scorer):
        torch.manual_seed(1)
        alone.append([one.run([request])[0].texts for request in requests])
    assert alone[0] == alone[1]


def test_greedy_answers_leave_the_generator_alone(models, small):
    before = torch.get_rng_state()
    in_batches(Scorer(models["baichuan2-7b"], small), questions(max_new_tokens=2)[:3])
    assert torch.equal(torch.get_rng_state(), before)


def test_no_text_forges_a_role(models, small):
    scorer = Scorer(models["baichuan2-7b"], small, chat=True)
    ids = scorer.encode(Request(HOSTILE, max_new_tokens=1))
    assert (ids[0], ids[-1]) == (195, 196)
    assert not small.control_ids & set(ids[1:-1]) and len(ids) > 10
    assert not small.control_ids & set(Scorer(models["baichuan2-7b"], small).encode(Request(HOSTILE)))


def test_a_choices_ids_are_those_behind_its_whole_prompt(models, tokenizer):
    """Of which only the last line is encoded with each choice."""
    assert [p for p in tokenizer.get_vocab() if "\n" in p] == ["\n"]
    scorer = Scorer(models["baichuan2-7b"], tokenizer)
    for text in (f"{HOSTILE}\n题目：水\n答案：", "a\n\n\nb", "one line", "a  \n  b: ", "ends\n", "\n"):
        for choice in (" A", "A", "\n", " 深水 and\nmore", "  x"):
            encoded = scorer._encode([Request(text, (choice,), by="loglikelihood")])[0]
            prompt, whole = (tokenizer.encode_text(one) for one in (text.rstrip() or text, text + choice))
            assert encoded.prompt.tolist() == prompt
            assert list(encoded.answers[0]) == whole[len(prompt) :]


def test_lengths_and_an_empty_prompt(models, small):
    scorer = Scorer(models["baichuan2-7b"], small)
    assert scorer.max_length == 1024
    assert (
        scorer.encode(Request("", max_new_tokens=3)) == [1]
        and scorer.length(Request("", max_new_tokens=3)) == 4
    )
    words = Request("the sea", **KINDS["words"])
    longest = max(len(small.encode_text("the sea" + choice)) for choice in words.choices)
    assert scorer.length(words) == longest


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_text_comes_from_a_broken_model(models, small, temperature):
    model = copy.deepcopy(models["baichuan2-7b"])
    model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    requests = questions(max_new_tokens=3, temperature=temperature)[:2]
    with pytest.raises(NumericalFault, match="NaN or infinite"):
        in_batches(Scorer(model, small), requests)
