"""``--style harness`` is lm-eval: its prompts byte for byte, its verdicts, without its leak and downloads."""

import importlib.metadata
import random
import socket
import sys
from types import SimpleNamespace

import pytest
import torch
from fixtures import SHARED, tiny_config

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval (the extra 'eval')")
from datasets import Dataset  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402

from baichuan_sft import BaichuanForCausalLM  # noqa: E402
from baichuan_sft.errors import EnvironmentFault  # noqa: E402
from baichuan_sft.evaluate import data, harness_tasks, sandbox, titles  # noqa: E402
from baichuan_sft.evaluate.benchmarks import BENCHMARKS  # noqa: E402
from baichuan_sft.evaluate.harness_style import prompter  # noqa: E402
from baichuan_sft.evaluate.items import Item, Response, Settings, Subject  # noqa: E402
from baichuan_sft.evaluate.scorer import Scorer  # noqa: E402

EVALDATA = SHARED / "evaldata"
TASKS = harness_tasks._tasks()
SUBJECTS = {
    "ceval": "accountant",
    "mmlu": "anatomy",
    "cmmlu": "agronomy",
    "agieval": "gaokao-physics",
    "jecqa": "jec-qa-kd",
    "medical": "mmlu/anatomy",
    "bbh": "navigate",
    "math": "algebra",
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def made(benchmark, i):
    """The i-th question of a benchmark in the form of its reader; answers take turns."""
    subject = SUBJECTS.get(benchmark.name, benchmark.name)
    question, fields = f" 第{i}题: which {i} {{{{of}}}} these?", {}
    if benchmark.kind == "choice":
        choices = tuple(f"{i}{letter} text" for letter in ("uvwxy" if "medqa" in benchmark.name else "uvwx"))
        return Item(f"{subject}/{i}", question, "ABCD"[i % 4], choices)
    if benchmark.kind == "code":
        tests = (f"assert {i}", "assert 2", "assert 3")
        fields = {"prompt": question, "test": "assert f()", "entry_point": f"f{i}", "code": "y = 2"}
        fields["test_list"] = tests
    if benchmark.kind in ("number", "expression"):
        fields = {"solution": f"{i} apples are $\\boxed{{{i}}}$.\n#### {i}"}
    return Item(f"{subject}/{i}", question, str(i), fields=fields)


def hand_made(name, num_items=8, num_shots=12):
    benchmark = BENCHMARKS[name]
    items = [made(benchmark, i) for i in range(num_items + num_shots)]
    subject = SUBJECTS.get(name, name)
    return benchmark, Subject(subject, "某科", tuple(items[:num_items]), tuple(items[num_items:]))


def oracle(benchmark, item):
    """What a model that knows the answer says."""
    if benchmark.kind == "choice":
        return Response(
            scores=tuple(-0.5 if "ABCDE"[i] == item.answer else -9.0 for i in range(len(item.choices)))
        )
    says = {
        "number": "apples\n#### {}",
        "expression": "Final Answer: The final answer is ${}$. I hope it is correct.",
        "answer": "We Quote. So the answer is {}.",
    }
    return Response(texts=(says.get(benchmark.kind, "{}").format(item.answer),))


# ---- lm-eval itself, over the authors' records

# name -> lm-eval's file, and the record of an item in the data set that it names
RECORDS = {
    "ceval": (
        "ceval/ceval-valid_accountant.yaml",
        lambda i: {"question": i.question, **abcd(i), "answer": i.answer},
    ),
    "cmmlu": ("cmmlu/cmmlu_agronomy.yaml", lambda i: {"Question": i.question, **abcd(i), "Answer": i.answer}),
    "mmlu": (
        "mmlu/default/mmlu_anatomy.yaml",
        lambda i: {"question": i.question, "choices": list(i.choices), "answer": place(i)},
    ),
    "medmcqa": (
        "medmcqa/medmcqa.yaml",
        lambda i: {"question": i.question, **abcd(i, "opa opb opc opd"), "cop": place(i)},
    ),
    "medqa-usmle": (
        "medqa/medqa.yaml",
        lambda i: {"sent1": i.question, **abcd(i, "ending0 ending1 ending2 ending3"), "label": place(i)},
    ),
    "bbh": ("bbh/cot_fewshot/navigate.yaml", lambda i: {"input": i.question, "target": i.answer}),
    "gsm8k": ("gsm8k/gsm8k.yaml", lambda i: {"question": i.question, "answer": i.fields["solution"]}),
    "math": (
        "minerva_math/minerva_math_algebra.yaml",
        lambda i: {"problem": i.question, "solution": i.fields["solution"]},
    ),
    "humaneval": ("humaneval/humaneval.yaml", lambda i: dict(i.fields)),
    "mbpp": ("mbpp/mbpp.yaml", lambda i: {"text": i.question, **i.fields}),
}


def abcd(item, names="A B C D"):
    return dict(zip(names.split(), item.choices, strict=True))


def place(item):
    return "ABCD".index(item.answer)


@pytest.fixture
def extras(monkeypatch):
    """What the Python files of MATH, HumanEval and MBPP import and neither prompt needs."""
    nothing = SimpleNamespace(
        load=lambda _: SimpleNamespace(compute=lambda **_: None), parse=None, verify=None
    )
    for name in ("evaluate", "antlr4", "math_verify"):
        monkeypatch.setitem(sys.modules, name, nothing)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "4.11")


def lm_eval_requests(name, subject, num_shots, seed):
    """The requests that lm-eval makes, through its own reader, data sets and functions; one list per item."""
    file, record = RECORDS[name]
    items, shots = (Dataset.from_list([record(i) for i in some]) for some in (subject.items, subject.shots))
    splits = dict.fromkeys(("test", "val", "validation"), items) | dict.fromkeys(("dev", "train"), shots)
    task = ConfigurableTask(config={**load_yaml(TASKS / file), "custom_dataset": lambda **_: splits})
    task.set_config("num_fewshot", num_shots)
    task.set_fewshot_seed(seed)
    task.build_all_requests(rank=0, world_size=1)
    return task, [[one for one in task.instances if one.doc_id == k] for k in range(len(subject.items))]


@pytest.mark.parametrize("name", RECORDS)
def test_prompts_are_those_of_lm_eval(name, extras, monkeypatch):
    benchmark, subject = hand_made(name)
    if name == "medqa-usmle":  # its file is of four options
        four = [
            Item(i.id, i.question.strip(), i.answer, i.choices[:4]) for i in (*subject.items, *subject.shots)
        ]
        subject = Subject(subject.name, subject.title, tuple(four[:8]), tuple(four[8:]))
    _, wanted = lm_eval_requests(name, subject, benchmark.shots, seed=1234)
    ours = prompter(benchmark, subject, Settings(seed=1234))
    assert ours.num_shots == benchmark.shots
    for item, instances in zip(subject.items, wanted, strict=True):
        request = ours.request(item, ours.num_shots)
        assert {one.arguments[0] for one in instances} == {request.text}
        if benchmark.kind == "choice":
            assert request.choices == tuple(one.arguments[1] for one in instances)
            assert request.by == "loglikelihood"
        else:
            asked = instances[0].arguments[1]
            cut = {"Q": "Q:"}  # a capital Q alone ends answers that hold one
            assert request.stop == tuple(cut.get(stop, stop) for stop in asked["until"])
            assert request.max_new_tokens == asked.get("max_gen_toks", 256)
            assert not asked.get("do_sample") and request.temperature == 0


@pytest.mark.parametrize("name", ["ceval", "mmlu", "medmcqa", "bbh", "gsm8k"])
def test_verdicts_are_those_of_lm_eval(name):
    benchmark, subject = hand_made(name)
    ours = prompter(benchmark, subject, Settings())
    task, instances = lm_eval_requests(name, subject, 0, seed=0)
    draw, seen = random.Random(0), set()
    for item, asked in zip(subject.items, instances, strict=True):
        for _ in range(20):
            scores = tuple(-draw.random() for _ in item.choices)
            answer = draw.choice([item.answer, "7", "1,0"])
            text = draw.choice(
                ["#### {}.", "it is {} or so", "the answer is {}.", "", "the answer is {}.\nor not"]
            )
            response = Response(scores=scores, texts=() if scores else (text.format(answer),))
            for one, resp in zip(asked, [(s, False) for s in scores] or response.texts, strict=True):
                one.resps = [resp]
            task._instances = asked
            task.apply_filters()
            verdicts = {
                key: task.process_results(asked[0].doc, [one.filtered_resps[key] for one in asked])
                for key in asked[0].filtered_resps
            }
            found = [verdict.get("acc", verdict.get("exact_match")) for verdict in verdicts.values()]
            outcome = ours.judge(item, response)
            assert outcome.score == found[0]
            if len(found) > 1:
                assert list(outcome.detail.values()) == found
            seen.add(outcome.score)
    assert seen == {0.0, 1.0}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = BaichuanForCausalLM(tiny_config("baichuan2-7b", max_position_embeddings=1024)).eval()
    for weight in made.model.layers.parameters():
        if weight.dim() > 1:
            weight.data.mul_(4)  # scores of items differ, and what is generated
    return made


@pytest.mark.parametrize("name", ["ceval", "mmlu", pytest.param("gsm8k", marks=pytest.mark.slow)])
def test_a_whole_run_is_that_of_lm_eval(name, model, small):
    """Its evaluator, its HFLM and its logged samples against our scorer and verdicts."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    benchmark, subject = hand_made(name, num_items=3)
    task, _ = lm_eval_requests(name, subject, benchmark.shots, seed=7)
    task.set_fewshot_seed(7)  # building the requests above drew from it
    theirs = evaluate(
        lm=HFLM(pretrained=model, tokenizer=small, backend="causal", batch_size=4, max_length=1024),
        task_dict={name: task},
        bootstrap_iters=0,
    )
    assert theirs is not None
    scorer, ours = Scorer(model, small), prompter(benchmark, subject, Settings(seed=7))
    requests = [ours.request(item, ours.num_shots) for item in subject.items]
    found = {}
    for batch in scorer.plan(requests):
        found |= dict(zip(batch, scorer.run([requests[i] for i in batch])))
    answers = set()
    first = theirs["samples"][name][0]["filter"]
    for sample in theirs["samples"][name]:
        item, response = subject.items[sample["doc_id"]], found[sample["doc_id"]]
        outcome = ours.judge(item, response)
        answers.add(response.texts or tuple(round(score, 3) for score in response.scores))
        score = sample.get("acc", sample.get("exact_match"))
        if response.texts:
            assert response.texts[0] == sample["resps"][0][0]
            assert outcome.detail[sample["filter"]] == score
            assert sample["filter"] != first or outcome.prediction == sample["filtered_resps"][0]
        else:
            logged = [float(resp[0][0]) for resp in sample["resps"]]
            assert response.scores == pytest.approx(logged, abs=2e-5)  # fp32 sums in another order
            assert outcome.score == score
    assert len(answers) == len(subject.items)  # one answered for another would be seen


# ---- every benchmark


@pytest.mark.parametrize("name", BENCHMARKS)
def test_an_oracle_is_right_and_a_constant_letter_has_its_share(name, monkeypatch):
    monkeypatch.setattr(sandbox, "passes", lambda program, **_: sandbox.Verdict("right" in program, ""))
    benchmark, subject = hand_made(name)
    ours = prompter(benchmark, subject, Settings())
    for item in subject.items:
        if benchmark.kind == "code":
            right = [ours.judge(item, Response(texts=(text,))).score for text in ("right", "left")]
            assert right == [1.0, 0.0]
            continue
        outcome = ours.judge(item, oracle(benchmark, item))
        assert outcome.score == (None if benchmark.kind == "translation" else 1.0)
        assert outcome.prediction == item.answer
    if benchmark.kind == "choice":
        always = Response(scores=(0.0,) + (-1.0,) * (len(subject.items[0].choices) - 1))
        assert sum(ours.judge(item, always).score for item in subject.items) == 2  # A is right in 2 of 8
    elif benchmark.kind not in ("code", "translation"):
        assert ours.judge(subject.items[0], Response(texts=("I do not know.",))).score == 0


@pytest.mark.parametrize("name", BENCHMARKS)
def test_no_prompt_holds_its_own_question_with_its_answer(name):
    benchmark, subject = hand_made(name)
    asked = subject.items[0]
    spaced = Item("shots/0", asked.question.replace(" ", "\n "), asked.answer, asked.choices, asked.fields)
    subject = Subject(subject.name, subject.title, subject.items, (spaced, *subject.shots[:8]))
    for seed in range(5):
        ours = prompter(benchmark, subject, Settings(seed=seed, shots=9))
        assert "shots/0" not in ours.shot_ids(asked, ours.num_shots)
        for item in subject.items:
            assert (
                ours.request(item, ours.num_shots).text.count(item.question.split(":")[0].strip() + ":") == 1
            )


@pytest.mark.parametrize("name", ["bbh", "math", "mbpp"])
def test_an_example_of_lm_evals_own_is_not_asked_with_its_answer(name):
    benchmark, subject = hand_made(name)
    family = harness_tasks.FAMILIES[name]
    _, samples, _ = harness_tasks.make_task(family, benchmark, subject, [family.doc(subject.items[0])])
    item = Item("own/0", samples[1][family.question] + " ", "1", fields=subject.items[0].fields)
    ours = prompter(benchmark, Subject(subject.name, "", (item, subject.items[0]), ()), Settings())
    ids = ours.shot_ids(item, ours.num_shots)
    assert [name.rpartition("/")[2] for name in ids] == [str(i) for i in range(len(samples)) if i != 1]
    assert ours.request(item, ours.num_shots).text.count(item.question.strip()) == 1
    assert len(ours.shot_ids(subject.items[0], ours.num_shots)) == len(samples)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_shots_are_dropped_from_the_front(name):
    benchmark, subject = hand_made(name)
    ours, item = prompter(benchmark, subject, Settings()), subject.items[3]
    whole, ids = ours.request(item, ours.num_shots).text, ours.shot_ids(item, ours.num_shots)
    assert len(ids) == len(set(ids)) == ours.num_shots == benchmark.shots
    description = ours.task.config.description
    assert whole.startswith(description)
    for num_shots in range(ours.num_shots):
        text = ours.request(item, num_shots).text
        assert ours.shot_ids(item, num_shots) == ids[len(ids) - num_shots :]
        assert text.startswith(description) and whole.endswith(text.removeprefix(description))
        assert len(text) < len(whole)
    assert ours.request(item, ours.num_shots).text == whole  # whatever was asked before


def test_the_seed_draws_other_examples_for_each_item():
    benchmark, subject = hand_made("gsm8k")
    ids = {
        seed: [prompter(benchmark, subject, Settings(seed=seed)).shot_ids(item, 4) for item in subject.items]
        for seed in (0, 0.0, 1)
    }
    assert ids[0] == ids[0.0] != ids[1]
    assert len(set(ids[0])) > 1


def test_samples_of_programs():
    benchmark, subject = hand_made("humaneval")
    ours, item = prompter(benchmark, subject, Settings(samples=4)), subject.items[0]
    request = ours.request(item, 0)
    assert (request.samples, request.temperature) == (4, 0.2)
    assert ours.request(item, 0).text == item.fields["prompt"]


def test_a_share_of_the_samples_passes(monkeypatch):
    benchmark, subject = hand_made("mbpp")
    asked = []
    monkeypatch.setattr(
        sandbox,
        "passes",
        lambda program, **how: asked.append(how) or sandbox.Verdict("right" in program, "why"),
    )
    ours = prompter(benchmark, subject, Settings(samples=4, allow_unsandboxed=True))
    outcome = ours.judge(subject.items[0], Response(texts=("right", "wrong", "right", "right")))
    assert outcome.score == 0.75
    assert outcome.detail == {"passed": [True, False, True, True], "reasons": ["why"] * 4}
    assert asked == [{"allow_unsandboxed": True}] * 4


def test_agieval_asks_as_its_authors_and_scores_whole_options():
    """lm-eval's file takes prompts as its data set has them, made by AGIEval's ``convert_zero_shot``."""
    item = Item("sat-math/0", "1+1=?", "B", ("1", "2"), {"passage": "Some sums. "})
    shot = Item("sat-math/1", "1+2=?", "A", ("3", "4"))
    ours = prompter(BENCHMARKS["agieval"], Subject("sat-math", "", (item,), (shot,)), Settings(shots=1))
    request = ours.request(item, 1)
    assert request.text == (
        "Q: 1+2=? Answer Choices: (A)3 (B)4\nA: Among A through B, the answer is (A)3\n\n"
        "Some sums. Q: 1+1=? Answer Choices: (A)1 (B)2\nA: Among A through B, the answer is"
    )
    assert request.choices == (" (A)1", " (B)2")
    item = Item("jec-qa-kd/0", "哪一项？", "B", ("甲", "乙", "丙", "丁"))
    ours = prompter(BENCHMARKS["jecqa"], Subject("jec-qa-kd", "", (item,), ()), Settings())
    assert ours.num_shots == 0
    assert (
        ours.request(item, 0).text == "问题：哪一项？ 选项：(A)甲 (B)乙 (C)丙 (D)丁\n答案：从A到D, 我们应选择"
    )


@pytest.mark.parametrize("name, target", [("flores-en", "English"), ("flores-ja", "Japanese")])
def test_translations_are_asked_as_phrases(name, target):
    item, shot = Item("x/0", "你好。", "Hello."), Item("x/1", "再见。", "Goodbye.")
    ours = prompter(BENCHMARKS[name], Subject(name, "", (item,), (shot,)), Settings())
    phrases = f"Chinese phrase: 再见。\n{target} phrase: Goodbye.\n\nChinese phrase: 你好。\n{target} phrase:"
    assert ours.request(item, 1).text == phrases
    assert ours.judge(item, Response(texts=(" Hi. ",))).prediction == "Hi."


def test_a_program_with_fewer_tests_than_the_prompt_shows():
    item = Item("mbpp/11", "Add.", "pass", fields={"test_list": ("assert add(1, 1) == 2",)})
    ours = prompter(BENCHMARKS["mbpp"], Subject("mbpp", "", (item,), ()), Settings())
    assert ours.request(item, 3).text.endswith("tests:\n\nassert add(1, 1) == 2\n\n\n[BEGIN]\n")


# ---- lm-eval's files


def test_lm_eval_has_a_file_for_every_subject():
    """A subject without one would be asked by its family's template under our description."""
    subjects = {"ceval": titles.CEVAL, "cmmlu": titles.CMMLU, "agieval": titles.AGIEVAL}
    for name, known in subjects.items():
        assert len(known) >= 11
        missing = [s for s in known if not (TASKS / harness_tasks.FAMILIES[name].file.format(s)).is_file()]
        assert not missing


def test_a_subject_of_the_users_own_has_the_form_of_its_benchmark():
    benchmark, subject = hand_made("ceval")
    own = Subject("ours", "某科", subject.items, subject.shots)
    theirs = prompter(benchmark, subject, Settings()).request(subject.items[0], 5).text
    text = prompter(benchmark, own, Settings()).request(subject.items[0], 5).text
    assert text == theirs.replace("注册会计师", "某科")


@pytest.mark.parametrize(
    "content", [None, "include: nowhere\n", "a: [", "doc_to_text: !function utils.absent\n"]
)
def test_a_file_that_lm_eval_would_leave_out_in_silence_is_named(content, tmp_path, monkeypatch):
    monkeypatch.setattr(harness_tasks, "_tasks", lambda: tmp_path)
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k/utils.py").write_text("here = 1\n")
    if content:
        (tmp_path / "gsm8k/gsm8k.yaml").write_text(content)
    with pytest.raises(
        EnvironmentFault, match=r"cannot give the task .*gsm8k\.yaml .*lm-eval==0\.4\.13"
    ) as fault:
        prompter(*hand_made("gsm8k"), Settings())
    assert "\n" not in str(fault.value)
    harness_tasks._module.cache_clear()


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(harness_tasks, "find_spec", lambda _: None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'baichuan-sft\[eval\]'"):
        harness_tasks._tasks.__wrapped__()


# ---- the authors' own questions


@pytest.mark.skipif(not EVALDATA.is_dir(), reason=f"needs samples of the benchmarks ({EVALDATA} is absent)")
@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_samples(name):
    try:
        loaded = data.load(name, EVALDATA, Settings())
    except data.Absent as absent:
        pytest.skip(str(absent))
    benchmark = BENCHMARKS[name]
    for subject in loaded.subjects:
        ours = prompter(benchmark, subject, Settings())
        if name in ("mmlu", "cmmlu", "agieval", "jecqa", "medical"):
            assert (TASKS / ours.family.file.format(subject.name.split("/")[-1])).is_file()
        for item in subject.items:
            request = ours.request(item, ours.num_shots)
            question = ours.task.doc_to_text(ours.family.doc(item))
            assert request.text.endswith(question) and request.text.count(question) == 1
            assert len(request.choices) == len(item.choices)
            if benchmark.kind == "code":
                said = item.answer
                assert not any(stop in said for stop in request.stop)
            else:
                response = oracle(benchmark, item)
                assert not any(stop in text for text in response.texts for stop in request.stop)
                assert ours.judge(item, response).score in (1.0, None), item.id
