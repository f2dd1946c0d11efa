"""What a reader gets of an evaluation: tables, plots, verdicts and curves."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from baichuan_sft.errors import UserError
from baichuan_sft.evaluate import compare, curve, plots, published, report, runner
from baichuan_sft.evaluate.benchmarks import BENCHMARKS, DOMAINS
from baichuan_sft.evaluate.items import Item, Outcome
from baichuan_sft.evaluate.scores import paired
from baichuan_sft.variants import VARIANTS

FACTS = {
    "path": "/runs/百川$x$|[bold]",
    "variant": "baichuan2-7b",
    "quantization": None,
    "revision": None,
    "fingerprint": "f" * 64,
}


def entry(name, style="baichuan", value=50.0, **changes):
    """A task's entry of results.json."""
    benchmark = BENCHMARKS[name]
    metric = {"translation": "BLEU", "code": "pass@1"}.get(benchmark.kind, "accuracy")
    return {
        **dict(benchmark=name, style=style, domain=benchmark.domain, metric=metric),
        **dict(
            value=value,
            low=value - 4,
            high=value + 4,
            items=200,
            skipped={},
            shots={str(benchmark.shots): 200},
        ),
        **dict(data_sha256="d" * 64, prompts_sha256="e" * 64, seconds=12.5, tokens=1000),
        **dict(tokens_per_second=80.0, items_per_second=16.0, published=published.figure(name, FACTS)),
        **dict(per_subject={}, more={}, notes=[], error=None),
        **changes,
    }


def failed(name, style, error):
    return runner.blank(BENCHMARKS[name], style, error)


def results(*tasks, absent=(), **facts):
    return {"format": 1, "model": FACTS | facts, "settings": {}, "tasks": list(tasks), "absent": list(absent)}


def cells(markdown, start):
    """The cells of the only row of a table that starts like that."""
    (line,) = [line for line in markdown.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def colours(path):
    """Of a plot: colour -> number of pixels."""
    image = Image.open(path).convert("RGB")
    return {colour: count for count, colour in image.getcolors(image.width * image.height)}


# --- published ----------------------------------------------------------------------------------------------


def test_every_base_model_has_a_figure_for_every_benchmark():
    for variant in VARIANTS:
        assert all(published.figure(name, variant) is not None for name in BENCHMARKS), variant
    for figures in published.FIGURES.values():
        assert set(figures) <= set(BENCHMARKS) and all(0 <= value <= 100 for value in figures.values())


def test_averages_of_the_table_are_those_that_the_vendor_prints():
    """README_EN.md of Baichuan2 has the mean over the seven languages too: a slip in typing would show."""
    printed = {
        **{"GPT-4": 20.43, "GPT-3.5-Turbo": 17.59, "LLaMA-7B": 7.63, "LLaMA2-7B": 10.14, "MPT-7B": 7.48},
        **{"Falcon-7B": 7.91, "ChatGLM2-6B": 6.68, "Baichuan-7B": 10.50, "Baichuan2-7B-Base": 13.25},
        **{"LLaMA-13B": 10.07, "LLaMA2-13B": 12.17, "Vicuna-13B": 11.31, "Chinese-Alpaca-Plus-13B": 8.27},
        **{"XVERSE-13B": 14.53, "Baichuan-13B-Base": 13.19, "Baichuan2-13B-Base": 16.09},
    }
    for model, value in printed.items():
        figures = [published.FIGURES[model][name] for name in DOMAINS["translation"]]
        assert report.mean(figures) == f"{value:.2f}"


OTHER = {"variant": "baichuan2-13b"}
BASE13 = {"variant": "baichuan-13b", "path": "baichuan-inc/Baichuan-13B-Base"}


@pytest.mark.parametrize(
    "changes, name",
    [
        ({}, "Baichuan2-7B-Base"),
        ({"variant": "baichuan2-7b, 2 x 64"}, None),
        (OTHER | {"path": "/models/Baichuan2-13B-Chat"}, "Baichuan2-13B-Chat"),
        (OTHER | {"path": "/models/Baichuan2-13B-Chat/", "quantization": "nf4"}, "Baichuan2-13B-Chat-4bits"),
        (BASE13 | {"quantization": "nf4"}, "Baichuan-13B-Base-int4"),
        (BASE13 | {"quantization": "int8"}, "Baichuan-13B-Base-int8"),
        ({"quantization": "int8"}, "Baichuan2-7B-Base"),  # no figure of its own is published
        (BASE13 | {"path": "/hub/models--baichuan-inc--Baichuan-13B-Chat/snapshots/0a"}, "Baichuan-13B-Chat"),
        ({"path": "/runs/Baichuan-13B-Chat/sft-7b"}, "Baichuan2-7B-Base"),  # another variant's directory
        ({"path": "/gpt-4/Baichuan2-7B-Chat/Baichuan-7B/sft"}, "Baichuan2-7B-Chat"),
        ({"revision": "train_00220B"}, None),
    ],
)
def test_which_published_model_a_model_is_beside(changes, name):
    assert published.name_of(FACTS | changes) == name


def test_figures_of_another_measure_are_said_to_be():
    assert set(published.REMARKS) <= set(BENCHMARKS) and "mean over tasks" in published.REMARKS["bbh"]
    for name in DOMAINS["translation"]:
        assert ("not comparable" in published.REMARKS[name]) == (name == "flores-ja")


def test_figures_by_variant_and_by_name():
    assert published.figure("ceval", "baichuan2-7b") == published.figure("ceval", "Baichuan2-7B-Base") == 54.0
    assert published.figure("cmmlu", "baichuan-inc/Baichuan2-13B-Chat") == 59.68
    assert published.figure("gsm8k", "Baichuan2-13B-Chat") is None
    assert published.figure("ceval", "my-model") is None


# --- the tables ---------------------------------------------------------------------------------------------


def test_table_is_laid_out_as_the_readme():
    all_tasks = [entry(name, value=40.0 + i) for i, name in enumerate(BENCHMARKS)]
    text = report.markdown(
        [results(*all_tasks), results(*all_tasks, path="/b/c", variant="baichuan-13b")], []
    )
    headings = [line for line in text.splitlines() if line.startswith("#")]
    sizes = ["### 7B models", "### 13B models"]
    expected = ["# Evaluation"]
    for section in ("General", "Law and medicine", "Mathematics and code", "Multilingual"):
        expected += [f"## {section}", *sizes]
    assert headings == [*expected, "## Details", "## Notes"]
    general = text.split("## Law")[0]
    assert "|  | **C-Eval** | **MMLU** | **CMMLU** | **Gaokao** | **AGIEval** | **BBH** |\n" in general
    assert "|  | 5-shot | 5-shot | 5-shot | 5-shot | 5-shot | 3-shot |\n" in general
    row = cells(general, "Baichuan2-7B-Base")
    assert row == ["Baichuan2-7B-Base", "54.00", "54.16", "57.07", "47.47", "42.73", "41.56"]
    ours = cells(general, "**runs/")
    assert ours[1] == "40.00 [36.00, 44.00]"
    assert r"百川$x$\|[bold]" in ours[0] and ours[0].endswith("(baichuan)")
    translated = text.split("## Multilingual")[1].split("###")[1]
    assert cells(translated, "GPT-4")[-1] == "20.43"


def test_table_says_what_is_not_as_the_vendor_did_it():
    tasks = [
        entry(
            "ceval", shots={"3": 10, "5": 190}, skipped={"too long": 2}, notes=["4 items without an answer"]
        ),
        failed("mmlu", "baichuan", "mmlu/test/a.csv:3: 5 columns"),
        entry("humaneval", more={"pass@10": 61.5}),
        entry("flores-en"),
    ]
    text = report.markdown([results(*tasks, absent=["cmmlu: no files"])], [])
    row = cells(text.split("## Mathematics")[0], "**runs/")
    assert row[1:4] == ["50.00 [46.00, 54.00] (3-5-shot)", "error", "-"]
    assert (
        cells(text.split("## Multilingual")[1].split("## Details")[0], "**runs/")[-1] == "-"
    )  # six of seven absent
    notes = text.split("## Notes")[1]
    for line in (
        "ceval: 2 items skipped, too long",
        "ceval: 4 items without an answer",
        "mmlu (baichuan): mmlu/test/a.csv:3: 5 columns",
        "humaneval (baichuan): pass@10 61.50",
        "absent: cmmlu: no files",
        "published: the mean over subjects; base models on the test split",
        "flores-en: published: by OpenCompass, on the first 100 sentences",
    ):
        assert line in notes
    assert "## Law" not in text


def test_everything_is_written_and_the_terminal_table_holds_every_task(tmp_path):
    tasks = [entry(name, style, value=30.0) for name in BENCHMARKS for style in ("baichuan", "harness")]
    tasks[1] = failed("ceval", "harness", "no [such] file")
    verdict = dict(benchmark="mmlu", style="baichuan", verdict="lost", before=50.0, after=30.0, items=9)
    verdict |= dict(difference=-20.0, p=0.01, wins=1, losses=8, note="")
    refused = dict(
        benchmark="cmmlu", style="baichuan", verdict=None, before=1.0, after=2.0, error="other data"
    )
    shown = report.write(tmp_path, results(*tasks, absent=["x: y"]), [verdict, refused])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bars.png", "gains.png", "table.md"]
    for name in BENCHMARKS:
        assert len(re.findall(rf"^ *{name} ", shown, re.MULTILINE)) >= 2, name
    for words in (
        "-20.00 lost",
        "no [such] file",
        "absent: x: y",
        "not compared: other data",
        "百川$x$|[bold]",
    ):
        assert words in shown
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    expected = ["mmlu", "baichuan", "**lost**", "50.00", "30.00", "-20.00", "0.01", "1", "8", "9", ""]
    assert cells(text.split("## Before and after")[1].split("## Details")[0], "mmlu") == expected
    assert "other data" in text


def test_bars_are_as_long_as_their_values(tmp_path):
    blue, black = (0x1F, 0x77, 0xB4), (0, 0, 0)
    found = {}
    for value in (20.0, 80.0):
        for shown in (None, 54.0):
            task = entry("ceval", value=value, published=shown)
            plots.bars(tmp_path / "bars.png", ["ceval"], {"model": {"ceval": task}})
            found[value, shown] = colours(tmp_path / "bars.png")
    # The legend's patch and the interval over the bar weigh more on the short one.
    assert found[80.0, None][blue] / found[20.0, None][blue] == pytest.approx(4, rel=0.1)
    assert found[20.0, 54.0][black] > found[20.0, None][black] + 20  # a diamond of some 5 x 5 pixels


def test_labels_of_plots_can_be_drawn():
    assert plots.drawable("百$x$") == r"\u767e\$x\$"
    assert plots.drawable("a" * 300 + "/end") == "..." + "a" * 33 + "/end"


def test_no_result_at_all_is_a_table_too(tmp_path):
    task = failed("ceval", "baichuan", "broken")
    assert "broken" in report.write(tmp_path, results(task))
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]


# --- before and after ---------------------------------------------------------------------------------------


def evaluation(directory, name="cmmlu", scores=(), style="baichuan", identity=(), task=(), prompt="p"):
    """An output directory with one task; each score is that of an item."""
    (directory / "items").mkdir(parents=True)
    rows = [
        {
            **dict(
                id=f"{name}/{i}",
                subject="s",
                prompt_sha256=f"{prompt}{i}",
                num_shots=5,
                shot_ids=[],
                gold="A",
            ),
            **dict(prediction="A" if score else "B", score=score, scores=[0.0], tokens=9, detail={}),
        }
        for i, score in enumerate(scores)
    ]
    header = {"format": 1, "seed": 0, "chat": False, "dtype": "bfloat16", **dict(identity)}
    lines = "".join(json.dumps(row) + "\n" for row in [header, *rows])
    (directory / "items" / f"{name}.{style}.jsonl").write_text(lines, encoding="utf-8")
    value = 100 * sum(scores) / len(scores)
    text = json.dumps(results(entry(name, style, value=value, items=len(scores), **dict(task))))
    (directory / "results.json").write_text(text, encoding="utf-8")
    return directory


def test_verdicts_are_those_of_the_paired_test(tmp_path):
    before, after = [0] * 20 + [1] * 20, [1] * 15 + [0] * 5 + [0] * 2 + [1] * 18
    old, new = evaluation(tmp_path / "old", scores=before), evaluation(tmp_path / "new", scores=after)
    (found,) = compare.verdicts(new, old)
    assert (found["verdict"], found["wins"], found["losses"], found["items"]) == ("gained", 15, 2, 40)
    assert found["difference"] == pytest.approx(100 * 13 / 40)
    assert compare.verdicts(old, new)[0]["verdict"] == "lost"
    assert compare.verdicts(new, new)[0]["verdict"] == "within noise"
    items = [Item(f"cmmlu/{i}", "", "A") for i in range(40)]
    sides = ([Outcome("A", score) for score in scores] for scores in (before, after))
    assert found["p"] == paired(BENCHMARKS["cmmlu"], items, *sides).p


def test_items_that_one_side_did_not_ask_are_left_out_and_counted(tmp_path):
    new, old = (
        evaluation(tmp_path / "new", scores=[1] * 10 + [0] * 10),
        evaluation(tmp_path / "old", scores=[0] * 10),
    )
    (found,) = compare.verdicts(new, old)
    assert (found["wins"], found["items"]) == (10, 10) and "10 items asked of one model only" in found["note"]
    assert (found["before"], found["after"], found["difference"]) == (
        0,
        100,
        100,
    )  # of the ten both were asked


def test_a_difference_of_settings_is_told(tmp_path):
    old = evaluation(tmp_path / "old", scores=[0, 1])
    new = evaluation(tmp_path / "new", scores=[0, 1], identity={"chat": True})
    assert "chat False, now True" in compare.verdicts(new, old)[0]["note"]


@pytest.mark.parametrize(
    "other, words",
    [
        (
            dict(task={"data_sha256": "0" * 64}),
            "other data, sha256 dddddddddddd in .*new and 000000000000 in .*old",
        ),
        (
            dict(prompt="q", identity={"seed": 7}),
            r"other prompts for 2 of 2 items, first cmmlu/0 \(seed 7, now 0\)",
        ),
        (dict(task={"error": "no files"}), "has no result in .*old: no files"),
    ],
)
def test_what_cannot_be_compared_is_said(tmp_path, other, words):
    new = evaluation(tmp_path / "new", scores=[0, 1])
    (found,) = compare.verdicts(new, evaluation(tmp_path / "old", scores=[1, 1], **other))
    assert found["verdict"] is None and re.search(words, found["error"])


def test_mistakes_in_directories_are_one_line(tmp_path):
    new = evaluation(tmp_path / "new", scores=[0, 1])
    with pytest.raises(UserError, match=r"no results\.json; give the --output_dir"):
        compare.verdicts(new, tmp_path)
    with pytest.raises(UserError, match="share no task; the latter has mmlu/baichuan"):
        compare.verdicts(new, evaluation(tmp_path / "mmlu", "mmlu", scores=[1]))
    file = new / "items" / "cmmlu.baichuan.jsonl"
    file.write_text(file.read_text() + '{"id": "cmm')
    assert "cmmlu.baichuan.jsonl:4: not a line of an item" in compare.verdicts(new, new)[0]["error"]
    (new / "results.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        compare.read(new)


def test_gains_and_losses_have_their_colours(tmp_path):
    names = list(BENCHMARKS)
    kinds = ["gained", "lost", "within noise"]
    verdicts = [
        dict(
            benchmark=name, style="baichuan", verdict=kinds[i % 3], p=0.01, difference=[9.0, -7.0, 0.5][i % 3]
        )
        for i, name in enumerate(names)
    ]
    plots.gains(tmp_path / "all.png", verdicts)
    plots.gains(tmp_path / "gained.png", [v for v in verdicts if v["verdict"] == "gained"])
    green, red = (0x2C, 0xA0, 0x2C), (0xD6, 0x27, 0x28)
    some = colours(tmp_path / "all.png")
    assert some[green] > some[red] > 1000  # longer bars, and more of them
    assert colours(tmp_path / "gained.png").get(red, 0) < 1000  # of the legend alone


# --- the curve ----------------------------------------------------------------------------------------------


def run_directory(path, epoch, tokens=1951, log=False):
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps({"data": {"report": {"tokens": tokens}}}))
    if log:
        (path / "trainer_log.jsonl").write_text(json.dumps({"step": 1, "epoch": epoch}) + "\n")
    else:
        (path / "trainer_state.json").write_text(json.dumps({"epoch": epoch, "global_step": 3}))
    return path


def test_trained_tokens(tmp_path):
    assert curve.trained_tokens("train_00220B") == 220e9
    assert curve.trained_tokens("/models/Baichuan2-7B-Intermediate-Checkpoints@train_02420B") == 2420e9
    assert curve.trained_tokens("baichuan-inc/Baichuan2-7B-Base") == 2.64e12
    assert curve.trained_tokens(run_directory(tmp_path / "run" / "checkpoint-3", 2.0)) == 3902
    assert curve.trained_tokens(run_directory(tmp_path / "end", 0.5, log=True)) == 975.5
    assert curve.trained_tokens(run_directory(tmp_path / "streamed", 1.0, tokens=None)) is None
    for unknown in ("main", "retrain_5B", tmp_path):
        assert curve.trained_tokens(unknown) is None


def test_curve_is_in_order_of_tokens(tmp_path):
    names = ("ceval", "mmlu", "cmmlu", "flores-en")
    points = [
        (revision, results(*(entry(n, value=20.0 + i) for n in names), revision=revision))
        for i, revision in enumerate(("train_00440B", "train_00220B", "train_02420B"))
    ]
    points[1][1]["tasks"].pop(1)  # one model lacks MMLU
    curve.write(tmp_path, points)
    text = (tmp_path / "curve.md").read_text()
    order = [line.split("|")[1].strip() for line in text.splitlines() if "| train_" in line]
    assert order == ["train_00220B", "train_00440B", "train_02420B"]
    assert cells(text, "train_00220B")[1:4] == ["220B", "21.00 [17.00, 25.00]", "-"]
    assert cells(text, "train_02420B")[1] == "2.42T"
    assert (tmp_path / "curve.png").stat().st_size > 10_000


def test_curve_without_tokens_keeps_the_order_given(tmp_path):
    points = [(name, results(entry("ceval"), path=f"/none/{name}")) for name in ("b$", "a", "百川")]
    table = curve.write(tmp_path, points)
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["b$", "a", "百川"]
    tuned = tmp_path / "tuned"  # its own tokens are not the vendor's
    tuned.mkdir()
    (tuned / "trainer_state.json").write_text('{"epoch": 3.0}')
    (tuned / "run.json").write_text('{"data": {"report": {"tokens": 650}}}')
    names = ("/none/Baichuan2-7B-Base", str(tuned))
    table = curve.write(tmp_path, [(Path(n).name, results(entry("ceval"), path=n)) for n in names])
    assert [line.split("|")[2].strip() for line in table.splitlines()[2:]] == ["2.64T", "1,950"]
    assert (tmp_path / "curve.png").is_file()
    broken = failed("ceval", "baichuan", "broken")
    (tmp_path / "none").mkdir()
    assert "error" in curve.write(tmp_path / "none", [("a", results(broken)), ("b", results(broken))])
    assert not (tmp_path / "none" / "curve.png").exists()


@pytest.mark.parametrize(
    "number, text", [(220e9, "220B"), (2.64e12, "2.64T"), (1951, "1,951"), (3.5e6, "3.5M")]
)
def test_tokens_as_text(number, text):
    assert curve.tokens_text(number) == text
