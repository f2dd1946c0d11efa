"""`baichuan-sft eval`: the family's benchmarks on one or several models, and what training changed."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Any

from baichuan_sft.arguments import Parser, at_least_1, number
from baichuan_sft.errors import EnvironmentFault, UserError, first_line
from baichuan_sft.evaluate import benchmarks, runner
from baichuan_sft.evaluate.benchmarks import BENCHMARKS, DOMAINS, asked_as
from baichuan_sft.evaluate.evaluation import RESULTS, Target, Tasks, evaluate, load_tasks, styles_of
from baichuan_sft.evaluate.items import Settings
from baichuan_sft.quantization import add_model_options

EXAMPLE = """baichuan-sft eval --list --data_dir data/eval
  baichuan-sft eval output --tasks general,law --data_dir data/eval --output_dir scores
  baichuan-sft eval output-lora --tasks cmmlu,gsm8k --data_dir data/eval --compare Baichuan2-7B-Base
  baichuan-sft eval output/checkpoint-* --tasks ceval,mmlu,cmmlu --data_dir data/eval --output_dir curve"""
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EISDIR, errno.EIO}
BEFORE = "before"  # the directory of --compare's model


def build_parser() -> Parser:
    parser = Parser(
        prog="baichuan-sft eval",
        description="Ask a model the questions of the family's benchmarks, and score its answers. A run that "
        "was stopped goes on when the same command is given again.",
        example=EXAMPLE,
    )
    add = parser.add_argument
    whole = number(int, "a whole number of at least 0", lambda n: n >= 0)
    add("paths", nargs="*", metavar="DIR", help="models, adapters, checkpoints; of several also a curve")
    add(
        "--tasks",
        default="all",
        metavar="LIST",
        help=f"all (default), {', '.join(DOMAINS)}, or names of --list",
    )
    add("--data_dir", metavar="D", help="the benchmark authors' own files, a folder for each")
    add("--style", choices=[*runner.STYLES, "both"], default="baichuan", help="who asks: the vendor, lm-eval")
    add("--output_dir", default="evaluation", metavar="OUT", help="default evaluation")
    add(
        "--shots", type=whole, metavar="N", help="examples before each question (each benchmark's own number)"
    )
    add("--limit", type=at_least_1, metavar="N", help="so many items of each benchmark, drawn by the seed")
    add("--seed", type=whole, default=0, help="of examples, --limit and sampling; default 0")
    add("--samples", type=at_least_1, default=1, metavar="N", help="programs for each code item, for pass@k")
    add(
        "--chat", choices=("auto", "on", "off"), default="auto", help="ask as a user does (auto: chat models)"
    )
    add("--batch_tokens", type=at_least_1, metavar="N", help="asked at once; less where memory runs out")
    add("--allow_unsandboxed", action="store_true", help="run programs where no sandbox can be made")
    add("--compare", metavar="BASE", help="a model, or the OUT of an earlier run: what was gained and lost")
    add("--revisions", metavar="LIST", help="of the one repository DIR, commas between: a curve")
    add("--list", action="store_true", help="the benchmarks, and which of them D has")
    add_model_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Evaluate, and print the table.

    Returns:
        0, or 2 where a task could not be run; 130 where the user stopped it.
    Raises:
        UserError: wrong options, no such model. EnvironmentFault, CheckpointFault: as `load_model`.
    """
    args = build_parser().parse_args(sys.argv[1:] if argv is None else argv)
    if args.list:
        return show_list(args.data_dir)
    check_options(args)
    models, out = targets(args), Path(args.output_dir)
    tasks = load_tasks(args)
    for model in models:
        check_model(model.path, model.revision)
    if args.compare is not None and not Path(args.compare, RESULTS).is_file():
        check_model(args.compare, None)
    try:
        before, done = compared(args, tasks, out)
        for model in models:
            directory = out if len(models) == 1 else out / model.label
            done.append((model.label, evaluate(model, args, tasks, directory, before)))
        if len(models) > 1:
            from baichuan_sft.evaluate import curve, report

            asked = done[-len(models) :]
            report.write(out, [results for _, results in asked])
            curve.write(out, asked)
    except KeyboardInterrupt:
        print(f"\nstopped; {out} keeps what was answered, and the same command goes on.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno not in DISK:
            raise
        raise EnvironmentFault(
            f"{error.filename or out}: cannot be written: {error.strerror}; {out} keeps what was answered, "
            "and the same command goes on."
        ) from None
    print(f"written to {out}: " + ", ".join(sorted(path.name for path in out.iterdir())))
    entries = [
        entry
        for _, results in done
        for name in ("tasks", "failed", "verdicts")
        for entry in results.get(name, [])
    ]
    return 2 if any(entry.get("error") for entry in entries) else 0


def check_options(args: Any) -> None:
    """
    Raises:
        UserError: an option is missing, or one that the others leave without effect.
    """
    if not args.paths:
        raise UserError("no model is named; give the directory of one, of an adapter or of a checkpoint.")
    if args.data_dir is None:
        raise UserError("--data_dir is missing: the folder of the benchmarks' files; --list says which.")
    if not Path(args.data_dir).is_dir():
        raise UserError(f"--data_dir {args.data_dir}: no such directory.")
    if args.revisions is not None and len(args.paths) != 1:
        raise UserError(f"--revisions are of one repository, and {len(args.paths)} DIRs are given.")
    if not any(BENCHMARKS[name].kind == "code" for name in benchmarks.select(args.tasks)):
        for option, given in (("samples", args.samples > 1), ("allow_unsandboxed", args.allow_unsandboxed)):
            if given:
                raise UserError(f"--{option} is of code tasks, and --tasks {args.tasks} has none.")


def targets(args: Any) -> list[Target]:
    """What is evaluated, each with a label of its own: as many last parts of its path as tell them apart.

    Raises:
        UserError: one of them is given twice.
    """
    if args.revisions is not None:
        names = [word.strip() for word in args.revisions.split(",") if word.strip()]
        found = [Target(args.paths[0], name, name.replace("/", "_")) for name in names]
        if not names or len(set(names)) < len(names):
            raise UserError(f"--revisions {args.revisions!r} names none, or one twice.")
        return found
    parts = [Path(path).resolve().parts[1:] for path in args.paths]
    for length in range(1, 1 + max(map(len, parts))):
        labels = ["_".join(names[-length:]) for names in parts]
        if len({*labels, BEFORE}) > len(labels):
            return [Target(path, None, label) for path, label in zip(args.paths, labels)]
    raise UserError(f"of {', '.join(args.paths)} two are the same directory.")


def check_model(path: str, revision: str | None) -> None:
    """See a mistyped directory before the hours that the others take; fetch what is not in the cache.

    Raises:
        UserError: no such directory, repository or revision, or one that holds no model.
    """
    from baichuan_sft.checkpoint import base_of, load_config
    from baichuan_sft.evaluate.models import located

    load_config(base_of(located(path, revision)))


def compared(args: Any, tasks: Tasks, out: Path) -> tuple[Path | None, list[tuple[str, dict[str, Any]]]]:
    """Directory with the results of ``--compare``'s model, and label and results where they were made here.

    Raises:
        UserError: results of an earlier run that has none of the tasks.
    """
    from baichuan_sft.evaluate import compare

    if args.compare is None:
        return None, []
    if not Path(args.compare, RESULTS).is_file():
        return out / BEFORE, [
            (BEFORE, evaluate(Target(args.compare, None, BEFORE), args, tasks, out / BEFORE, None))
        ]
    have = {(task["benchmark"], task["style"]) for task in compare.read(args.compare)["tasks"]}
    if not have & {(name, style) for name in tasks.found for style in styles_of(args)}:
        raise UserError(
            f"--compare {args.compare}: has no result of --tasks {args.tasks} in --style {args.style}."
        )
    return Path(args.compare), []


def show_list(data_dir: str | None) -> int:
    """Print the benchmarks, where they come from, and what of them lies in ``data_dir``."""
    from baichuan_sft.evaluate import data

    for name, benchmark in BENCHMARKS.items():
        there = f"{benchmark.num_items:,} items" if benchmark.num_items else ""
        if data_dir is not None:
            try:
                loaded = data.load(name, data_dir, Settings())
                there = f"{sum(len(subject.items) for subject in loaded.subjects):,} items there"
            except data.Absent:
                there = "ABSENT"
            except UserError as error:
                there = first_line(error)
        facts = [benchmark.domain, f"{benchmark.shots} shots", there, f"licence: {benchmark.licence}"]
        print(f"{asked_as(name):12} {', '.join(filter(None, facts))}")
        print(f"{'':12} {benchmark.files}  from  {benchmark.source}")
    return 0
