"""What a run measures of itself besides its loss: benchmarks, answers, the best checkpoint, an early end."""

import csv
import json
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from fixtures import ROOT, SMALL_VOCABULARY, tiny_config
from launching import deepspeed, flags, log_of, make_nano

from baichuan_sft import BaichuanForCausalLM, load_model, load_tokenizer
from baichuan_sft.commit import checkpoints, sha256_of
from baichuan_sft.errors import UserError
from baichuan_sft.train import best
from baichuan_sft.train.best import by_step, ended_early, ranked
from baichuan_sft.train.sft import main
from baichuan_sft.train.trainer import SftTrainer

DATA = ROOT / "data" / "belle_chat.json"
NUM_ITEMS = 6  # of each hand-made benchmark


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    directory = tmp_path_factory.mktemp("nano")
    torch.manual_seed(0)
    BaichuanForCausalLM(tiny_config("baichuan2-7b", max_position_embeddings=768)).save_pretrained(directory)
    load_tokenizer(SMALL_VOCABULARY).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    """CMMLU and GSM8K by hand, in their authors' formats."""
    root = tmp_path_factory.mktemp("benchmarks")
    for split, count, first in (("dev", 5, 0), ("test", NUM_ITEMS, 50)):
        (root / "cmmlu" / split).mkdir(parents=True)
        with open(root / "cmmlu" / split / "agronomy.csv", "w", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["", "Question", "A", "B", "C", "D", "Answer"])
            for i in range(first, first + count):
                rows.writerow([i, f"{i} 加 1 等于多少？", i, i + 1, i + 2, i + 3, "B"])
    (root / "gsm8k").mkdir()
    for split, count, first in (("train", 5, 0), ("test", NUM_ITEMS, 50)):
        items = [
            {"question": f"{i} plus 1?", "answer": f"It is\n#### {i + 1}"}
            for i in range(first, first + count)
        ]
        text = "".join(json.dumps(item) + "\n" for item in items)
        (root / "gsm8k" / f"{split}.jsonl").write_text(text)
    return root


def words(nano, root, **options):
    """Six updates, the first epoch's three twice."""
    values = dict(
        model_name_or_path=nano,
        data_path=DATA,
        dev_ratio=0.1,
        output_dir=root / "out",
        cache_dir=root / "cache",
        model_max_length=64,
        packing_tokens=128,
        per_device_train_batch_size=3,
        max_steps=6,
        learning_rate=1e-3,
        neftune_noise_alpha=5.0,  # draws noise
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        check_reload=False,
        seed=5,
    )
    return flags(**{name: value for name, value in (values | options).items() if value is not None})


@pytest.fixture
def train(nano, tmp_path):
    """Train in this process; returns the output directory."""

    def call(**options):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        assert main(words(nano, tmp_path, **options)) == 0
        return options.get("output_dir", tmp_path / "out")

    return call


@pytest.fixture(scope="module")
def finished(nano, tmp_path_factory):
    """A run that measures nothing but the held-out loss, to be copied and compared with."""
    root = tmp_path_factory.mktemp("finished")
    assert main(words(nano, root)) == 0
    return root / "out"


def rows_of(directory):
    return [json.loads(line) for line in (directory / "trainer_log.jsonl").read_text().splitlines()]


def numbers(directory):
    return [(row["step"], row["loss"].hex(), row["grad_norm"].hex()) for row in log_of(directory)]


def facts(directory):
    return json.loads((directory / "run.json").read_text())


def weights(directory):
    (file,) = [*directory.glob("model.safetensors"), *directory.glob("adapter_model.safetensors")]
    return sha256_of(file)


def pretend(monkeypatch, values):
    """The held-out loss of update n is ``values[n]``: what a nano model does is no matter of choice."""
    loop = SftTrainer.evaluation_loop

    def evaluation_loop(self, *args, **kwargs):
        output = loop(self, *args, **kwargs)
        output.metrics["eval_loss"] = values[self.state.global_step]
        return output

    monkeypatch.setattr(SftTrainer, "evaluation_loop", evaluation_loop)


# --- benchmarks and answers -------------------------------------------------------------------------


def test_measuring_changes_nothing_in_training(train, finished, benchmarks, capsys):
    out = train(
        eval_tasks="cmmlu",
        eval_data_dir=benchmarks,
        eval_items=2,
        eval_tasks_steps=3,
        eval_answers=2,
    )
    assert numbers(out) == numbers(finished) and weights(out) == weights(finished)
    scored = [row for row in rows_of(out) if "eval_cmmlu" in row]
    assert [row["step"] for row in scored] == [0, 3, 6]
    for row in scored:  # to rounding
        assert -1e-9 <= row["eval_cmmlu_low"] <= row["eval_cmmlu"] + 1e-9 <= row["eval_cmmlu_high"] + 2e-9
    told = facts(out)
    assert [(row["step"], row["benchmark"]) for row in told["benchmarks"]] == [
        (step, "cmmlu") for step in (0, 3, 6)
    ]
    assert {row["items"] for row in told["benchmarks"]} == {2}
    assert len({row["prompt"] for row in told["held_out_answers"]}) == 2
    for row in told["held_out_answers"]:
        assert row.keys() == {"prompt", "reference", "before", "after"} and row["reference"]
    said = capsys.readouterr().out
    assert "step 3/6 cmmlu " in said and said.count("held-out answer after: ") == 2
    assert (out / "loss.png").stat().st_size > 0


def test_scores_in_training_are_those_of_the_command(train, benchmarks):
    """Of the result, asked again on its own."""
    from baichuan_sft.evaluate import data, runner
    from baichuan_sft.evaluate.benchmarks import BENCHMARKS
    from baichuan_sft.evaluate.items import Settings
    from baichuan_sft.evaluate.scorer import Scorer

    out = train(eval_tasks="cmmlu,gsm8k", eval_data_dir=benchmarks, eval_items=2, max_steps=1)
    settings = Settings(seed=5)
    scorer = Scorer(load_model(out), load_tokenizer(SMALL_VOCABULARY))
    told = facts(out)["benchmarks"]
    assert [(row["step"], row["benchmark"]) for row in told] == [
        (step, name) for step in (0, 1) for name in ("cmmlu", "gsm8k")
    ]
    for row in told[2:]:
        drawn = data.draw(data.load(row["benchmark"], benchmarks, settings), 2, 5)
        alone = runner.run(BENCHMARKS[row["benchmark"]], "baichuan", drawn, scorer, settings, None, facts={})
        assert (row["value"], row["items"]) == (alone["value"], 2)


def test_answers_are_the_models_own(train, nano):
    """Before: what the base says, greedily, to the question as training renders it."""
    out = train(eval_answers=1, max_steps=1)
    (row,) = facts(out)["held_out_answers"]
    tokenizer = load_tokenizer(SMALL_VOCABULARY)
    for when, path in (("before", nano), ("after", out)):
        model = load_model(path)
        ids = _ids_of(tokenizer, row["prompt"])
        made = ids
        for _ in range(5):
            made = torch.cat([made, model(made).logits[:, -1:].argmax(-1)], dim=1)
        start = tokenizer.decode(made[0, ids.shape[1] :].tolist(), skip_special_tokens=True)
        assert row[when].startswith(start.rstrip("\ufffd")[:4]) and start


def _ids_of(tokenizer, prompt):
    """Of a conversation of one question; decoding has put the roles' names into the text."""
    user, assistant = (tokenizer.decode([i]) for i in (tokenizer.user_token_id, tokenizer.assistant_token_id))
    system, _, question = prompt.removesuffix(assistant).partition(user)
    ids = [
        *tokenizer.encode_texts([system])[0],
        tokenizer.user_token_id,
        *tokenizer.encode_texts([question])[0],
    ]
    return torch.tensor([[*ids, tokenizer.assistant_token_id]])


def test_a_resumed_run_keeps_what_was_measured(train, finished, benchmarks, tmp_path):
    options = dict(
        eval_tasks="cmmlu", eval_data_dir=benchmarks, eval_items=4, eval_tasks_steps=2, eval_answers=1
    )
    out = train(**options)
    whole = facts(out)
    for path in checkpoints(out):
        if path.name in ("checkpoint-5", "checkpoint-6"):
            shutil.rmtree(path)
    (out / "COMMIT").unlink()
    train(**options, resume="auto")
    assert numbers(out)[-2:] == numbers(finished)[-2:]
    for name in ("benchmarks", "held_out_answers"):
        again, before = ([{**row, "seconds": 0} for row in told[name]] for told in (facts(out), whole))
        assert again == before


# --- the best checkpoint ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"use_lora": True}], ids=["full", "lora"])
def test_the_best_checkpoint_is_the_result(train, monkeypatch, options):
    pretend(monkeypatch, {1: 5.0, 2: 3.0, 3: 4.0, 4: 3.0, 5: 4.0, 6: 9.0})
    out = train(load_best_model_at_end=True, save_total_limit=1, **options)
    assert {path.name for path in checkpoints(out)} == {"checkpoint-2", "checkpoint-6"}
    assert weights(out) == weights(out / "checkpoint-2") != weights(out / "checkpoint-6")
    assert facts(out)["best"] == {"checkpoint": "checkpoint-2", "eval_loss": 3.0}


def test_the_best_survives_a_resume_in_another_place(train, monkeypatch, tmp_path):
    pretend(monkeypatch, {1: 5.0, 2: 3.0, 3: 4.0, 4: 8.0, 5: 4.0, 6: 9.0})
    options = dict(load_best_model_at_end=True, save_total_limit=1)
    train(**options, output_dir=tmp_path / "first", max_steps=4, lr_scheduler_type="constant")
    (tmp_path / "first").rename(tmp_path / "moved")
    longer = dict(output_dir=tmp_path / "moved", lr_scheduler_type="constant", allow_change="max_steps")
    out = train(**options, **longer, resume="auto", max_steps=6)
    assert {path.name for path in checkpoints(out)} == {"checkpoint-2", "checkpoint-6"}
    assert weights(out) == weights(out / "checkpoint-2")


def test_a_damaged_best_gives_way_to_the_next(train, monkeypatch, capsys):
    pretend(monkeypatch, {1: 5.0, 2: 3.0, 3: 4.0})

    take = best.Best._best_whole

    def damaged_first(self):
        file = self.best_saved()[0] / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        return take(self)

    monkeypatch.setattr(best.Best, "_best_whole", damaged_first)
    out = train(load_best_model_at_end=True, max_steps=3)
    assert weights(out) == weights(out / "checkpoint-3")
    said = capsys.readouterr().out
    assert "checkpoint-2: model.safetensors: checksum differs, so another one is the best" in said
    assert "best: checkpoint-3, eval_loss 4.0000, is the result; update 2 had 3.0000" in said


def test_accuracy_can_be_what_counts(train):
    out = train(load_best_model_at_end=True, metric_for_best_model="token_accuracy", max_steps=3)
    told = {row["step"]: row["eval_token_accuracy"] for row in rows_of(out) if "eval_token_accuracy" in row}
    assert facts(out)["best"]["eval_token_accuracy"] == max(told.values())


# --- an early end -----------------------------------------------------------------------------------


def test_training_ends_when_nothing_gets_better(train, monkeypatch, capsys):
    pretend(monkeypatch, {1: 5.0, 2: 3.0, 3: 4.0, 4: 3.0, 5: 2.0, 6: 1.0})
    options = dict(early_stopping_patience=2, load_best_model_at_end=True)
    out = train(**options)
    assert [row["step"] for row in log_of(out)] == [1, 2, 3, 4]
    assert "step 4: training ends early, 2 evaluations in a row were no better" in capsys.readouterr().out
    assert weights(out) == weights(out / "checkpoint-2")

    train(**options, resume="auto")  # nothing is left
    assert "already at update 4 of 6" in capsys.readouterr().out
    (out / "COMMIT").unlink()  # the result was not saved any more
    train(**options, resume="auto")
    assert [row["step"] for row in log_of(out)] == [1, 2, 3, 4]
    assert weights(out) == weights(out / "checkpoint-2")
    train(**options | {"early_stopping_patience": 3}, resume="auto")  # more patience goes on
    assert [row["step"] for row in log_of(out)] == [1, 2, 3, 4, 5, 6]
    assert weights(out) == weights(out / "checkpoint-6")


HISTORY = [{"step": 1, "eval_loss": 2.0}, {"step": 1, "loss": 9.0}, {"step": 2, "eval_loss": 1.0}]


@pytest.mark.parametrize(
    "more, patience, greater, ends",
    [
        ([], 1, False, False),
        ([], 1, True, True),  # of what should grow, 2.0 was better
        ([1.0], 1, False, True),  # an equal one is no better
        ([1.5, 0.5], 2, False, False),
        ([1.5, 1.1], 2, False, True),
        ([1.5, 1.1], None, False, False),
    ],
)
def test_patience_counts_evaluations(more, patience, greater, ends):
    history = HISTORY + [{"step": 3 + i, "eval_loss": value} for i, value in enumerate(more)]
    given = dict(
        early_stopping_patience=patience, metric_for_best_model="eval_loss", greater_is_better=greater
    )
    assert bool(ended_early(history, given)) == ends
    assert not ended_early([], given)


def test_the_first_of_equals_is_the_best():
    found = by_step([*HISTORY, {"step": 3, "eval_loss": 1.0}], "eval_loss")
    assert ranked(found, False) == [2, 3, 1] and ranked(found, True) == [1, 2, 3]


# --- what is refused --------------------------------------------------------------------------------

REFUSED = [
    ("--metric_for_best_model loss", "--metric_for_best_model loss needs --load_best_model_at_end True or"),
    ("--greater_is_better True", "--greater_is_better True needs"),
    ("--load_best_model_at_end True --metric_for_best_model accuracy", "did you mean 'eval_token_accuracy'"),
    ("--load_best_model_at_end True --greater_is_better True", "of eval_loss a smaller value is better"),
    (
        "--load_best_model_at_end True --save_strategy epoch",
        "--eval_strategy steps and --save_strategy epoch differ",
    ),
    ("--load_best_model_at_end True --eval_steps 2 --save_steps 3", "--save_steps 3 is no multiple of"),
    ("--early_stopping_patience 0", "--early_stopping_patience is 0; it must be"),
    ("--eval_tasks cmmul", "did you mean 'cmmlu'"),
    ("--eval_tasks cmmlu", "--eval_tasks needs --eval_data_dir"),
    ("--eval_tasks cmmlu --eval_data_dir no", "--eval_data_dir no: no such directory"),
    ("--eval_tasks mmlu --eval_data_dir data", "MMLU: no files .* licence: MIT"),
    ("--eval_tasks law --eval_data_dir data", "none of them lies in --eval_data_dir"),
    ("--eval_items 3", "--eval_items 3 needs --eval_tasks"),
    ("--eval_tasks_steps 3", "--eval_tasks_steps 3 needs --eval_tasks"),
]


@pytest.mark.parametrize("given, message", REFUSED)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(train, monkeypatch, given, message):
    monkeypatch.setattr("baichuan_sft.train.sft.load_base", lambda *a: pytest.fail("loaded a model"))
    names, values = given.split()[::2], given.split()[1::2]
    with pytest.raises(UserError, match=message) as caught:
        train(**{name[2:]: value for name, value in zip(names, values)})
    assert "\n" not in str(caught.value)


def test_answers_need_held_out_questions(train, tmp_path):
    with pytest.raises(UserError, match="--eval_answers 2 needs --dev_ratio or --eval_data_path"):
        train(eval_answers=2, dev_ratio=None, eval_strategy=None, eval_steps=None)
    (tmp_path / "plain.jsonl").write_text('{"text": "a b c"}\n' * 3)
    with pytest.raises(UserError, match="no held-out conversation has a question"):
        train(eval_answers=2, dev_ratio=None, eval_data_path=tmp_path / "plain.jsonl")


# --- real ranks -------------------------------------------------------------------------------------

CASES = [(None, "lora"), (2, "full"), (3, "full"), (3, "lora")]  # None: without DeepSpeed


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, benchmarks):
    """Runs of two ranks, with all that is measured, and without."""
    root = tmp_path_factory.mktemp("ranks")
    make_nano(root / "nano", "--hidden_size", 32, "--intermediate_size", 48)
    runs = []
    for stage, kind in CASES:
        options = dict(per_device_train_batch_size=2, max_steps=3)
        if stage is not None:
            config = json.loads((ROOT / "ds_config.json").read_text())
            zero = {"stage": stage} if stage != 3 else config["zero_optimization"]
            options["deepspeed"] = root / f"zero{stage}.json"
            options["deepspeed"].write_text(json.dumps({**config, "zero_optimization": zero}))
        if kind == "lora":
            options |= dict(use_lora=True, lora_rank=4, lora_dropout=0.1, neftune_noise_alpha=None)
        plain = dict(eval_strategy=None, eval_steps=None, output_dir=root / f"{stage} {kind} plain")
        runs.append(words(root / "nano", root, **options | plain))
        options |= dict(load_best_model_at_end=True, metric_for_best_model="token_accuracy", eval_answers=1)
        options |= dict(eval_tasks="cmmlu", eval_data_dir=benchmarks, eval_items=2, eval_tasks_steps=2)
        runs.append(words(root / "nano", root, output_dir=root / f"{stage} {kind}", **options))
    (root / "runs.json").write_text(json.dumps(runs))
    done = deepspeed(ROOT / "tests" / "many_runs.py", root / "runs.json")
    assert done.returncode == 0, done.stdout[-6000:]
    return root


@pytest.mark.slow
@pytest.mark.parametrize("stage, kind", CASES)
def test_measuring_changes_nothing_on_any_rank(ranks, stage, kind):
    out, plain = ranks / f"{stage} {kind}", ranks / f"{stage} {kind} plain"
    assert numbers(out) == numbers(plain) and len(numbers(out)) == 3
    told = facts(out)
    assert [row["step"] for row in told["benchmarks"]][:2] == [0, 2]
    assert told["held_out_answers"][0].keys() == {"prompt", "reference", "before", "after"}
    assert len({weights(path) for path in checkpoints(out)}) == 3
    chosen = out / told["best"]["checkpoint"]
    assert weights(out) == weights(chosen) == weights(plain / chosen.name)
