"""``baichuan-sft preview``: the tokens of a file's first conversations, the learnt ones in another colour."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from baichuan_sft.arguments import Parser, at_least_1
from baichuan_sft.data import files
from baichuan_sft.data.check import Rules
from baichuan_sft.data.findings import DataFault, Finding, RecordFault
from baichuan_sft.data.formats import FORMATS, escaped, parse
from baichuan_sft.data.length import TRUNCATION, fit
from baichuan_sft.data.reader import RawRecord, decode, locate, read_raw
from baichuan_sft.data.survey import DOCUMENT, layout_of
from baichuan_sft.data.template import IGNORE, TRAIN_ON, Rendered, render

TRAINED, SEEN, MARKER = "bold green", "dim", "dim reverse"
OPEN, CLOSE = "⟦", "⟧"
EXAMPLE = "baichuan-sft preview data/belle_chat.json --model_name_or_path ~/models/Baichuan2-7B-Base --num 2"

NOTHING = Rendered(np.empty(0, np.int32), np.empty(0, np.int32))

Piece = tuple[str, str]  # (what is printed, its style)


def preview(argv: list[str] | None = None) -> int:
    """Print the first conversations of a file token by token, as a model is trained on them.

    Trained tokens are green and the others dim; where there are no colours, trained ones stand in ⟦ ⟧.

    Args:
        argv: the arguments after ``preview``; None takes those of the process.
    Returns:
        The exit code, 0.
    Raises:
        UserError: wrong options, no tokenizer, an unreadable file, or a wrong record among those shown.
    """
    from baichuan_sft.checkpoint import load_tokenizer

    args = _parser().parse_args(argv)
    files.require_file(args.file)
    rules, layout = layout_of(args.file, Rules(data_format=args.data_format))
    records = list(islice(read_raw(args.file, _stop, layout=layout), args.num))
    tokenizer = load_tokenizer(args.tokenizer)
    console = Console(highlight=False, soft_wrap=True)
    coloured = console.color_system is not None
    console.print(_legend(coloured))
    trained = tokens = 0
    for record in records:
        segment = _render(record, args, rules, tokenizer)
        cut = (fit(segment, args.max_length, args.truncation) or [NOTHING])[0]
        console.print("\n", Text(_headline(args.file, record, segment, cut), style="bold"), sep="")
        console.print(joined(pieces(cut, tokenizer), coloured))
        trained, tokens = trained + num_targets(cut), tokens + len(cut.input_ids)
    console.print(f"\n{len(records)} conversations: {trained} of {tokens} tokens trained")
    return 0


def _stop(finding: Finding, raw: bytes | None) -> None:
    if finding.severity == "ERROR":
        raise DataFault(str(finding), [finding])


def _parser() -> Parser:
    parser = Parser(
        prog="baichuan-sft preview",
        description="Show which tokens of a data file are trained.",
        example=EXAMPLE,
    )
    parser.add_argument("file", metavar="FILE", help="a data file in any of the formats")
    parser.add_argument(
        "--tokenizer",
        "--model_name_or_path",
        required=True,
        metavar="DIR",
        help="directory of the model or its tokenizer.model",
    )
    parser.add_argument("--num", type=at_least_1, default=3, metavar="N", help="conversations shown (3)")
    parser.add_argument(
        "--max_length", type=at_least_1, default=512, metavar="T", help="cut, in tokens (512)"
    )
    parser.add_argument("--truncation", choices=list(TRUNCATION), default="cut_turns", help="(cut_turns)")
    parser.add_argument("--data_format", choices=[*FORMATS, DOCUMENT], help="default: told from the keys")
    parser.add_argument("--train_on", choices=list(TRAIN_ON), default="all", help="turns learnt (all)")
    return parser


def _render(record: RawRecord, args: Any, rules: Rules, tokenizer: Any) -> Rendered:
    try:
        messages, _ = parse(decode(record.data), rules.data_format)
        return render(messages, tokenizer, train_on=args.train_on)
    except RecordFault as fault:
        finding = locate(record, fault, args.file)
        raise DataFault(str(finding), [finding]) from None


def _headline(path: str, record: RawRecord, segment: Rendered, cut: Rendered) -> str:
    counts = f"{num_targets(cut)} of {len(cut.input_ids)} tokens trained"
    lost = len(segment.input_ids) - len(cut.input_ids)
    if not len(cut.input_ids):
        counts = f"{lost} tokens, none trained: no target is left, training drops it"
    elif lost:
        counts += f", {lost} cut off"
    place = f"{path}:{record.line}" if record.line else path
    return f"{place} item {record.item}  {counts}"


def num_targets(segment: Rendered) -> int:
    # Label 0 is never predicted: nothing stands before it.
    return int((segment.labels[1:] != IGNORE).sum())


def _legend(coloured: bool) -> Text:
    pieces = [("trained", TRAINED), (" seen only ", SEEN), ("<marker>", MARKER)]
    return Text("legend: ").append_text(joined(pieces, coloured))


def pieces(segment: Rendered, tokenizer: Any) -> Iterator[Piece]:
    """What is printed for a segment; a learnt end of turn stands before the marker its label lies on."""
    names = {
        tokenizer.user_token_id: "<user>",
        tokenizer.assistant_token_id: "<assistant>",
        tokenizer.eos_token_id: tokenizer.eos_token,
    }
    tokens = zip(segment.input_ids.tolist(), segment.labels.tolist())
    # Text is decoded in runs: one Chinese character may be three byte tokens.
    runs = groupby(tokens, key=lambda token: (names.get(token[0]), token[0] != token[1]))
    for (name, is_seen), run in runs:
        if name is None:
            text = tokenizer.decode([token for token, _ in run])
            yield "".join(map(escaped, text)), SEEN if is_seen else TRAINED
            continue
        for token, label in run:
            if label not in (token, IGNORE):
                yield names[label], TRAINED
            yield name, TRAINED if label == token else MARKER


def joined(pieces: Iterable[Piece], coloured: bool) -> Text:
    """The pieces as one styled text; without colours, brackets around each trained span."""
    text = Text()
    for is_trained, group in groupby(pieces, key=lambda piece: piece[1] == TRAINED):
        brackets = is_trained and not coloured
        text.append(OPEN if brackets else "")
        for content, style in group:
            text.append(content, style)
        text.append(CLOSE if brackets else "")
    return text
