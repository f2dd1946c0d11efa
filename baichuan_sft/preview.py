"""``baichuan-sft preview``: the tokens of a file's first conversations, the learnt ones in another colour."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from typing import Any

from rich.console import Console
from rich.text import Text

from baichuan_sft.arguments import Parser, at_least_1
from baichuan_sft.data.formats import escaped, parse
from baichuan_sft.data.reader import Record, read_records
from baichuan_sft.data.template import IGNORE, TRAIN_ON, Rendered, render
from baichuan_sft.errors import UserError

TRAINED, SEEN, MARKER = "bold green", "dim", "dim reverse"
OPEN, CLOSE = "⟦", "⟧"
EXAMPLE = "baichuan-sft preview data/belle_chat.json --model_name_or_path ~/models/Baichuan2-7B-Base --num 2"

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
    records = list(islice(read_records(args.file), args.num))
    tokenizer = load_tokenizer(args.tokenizer)
    console = Console(highlight=False, soft_wrap=True)
    coloured = console.color_system is not None
    console.print(_legend(coloured))
    trained = tokens = 0
    for record in records:
        segment = _render(record, tokenizer, args.train_on)
        cut = Rendered(segment.input_ids[: args.max_length], segment.labels[: args.max_length])
        console.print("\n", Text(_headline(record, segment, cut), style="bold"), sep="")
        console.print(_joined(_pieces(cut, tokenizer), coloured))
        trained, tokens = trained + _num_targets(cut), tokens + len(cut.input_ids)
    console.print(f"\n{len(records)} conversations: {trained} of {tokens} tokens trained")
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="baichuan-sft preview",
        description="Show which tokens of a data file are trained.",
        example=EXAMPLE,
    )
    parser.add_argument("file", metavar="FILE", help="JSON array or JSON Lines")
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
    parser.add_argument("--train_on", choices=list(TRAIN_ON), default="all", help="turns learnt (all)")
    return parser


def _render(record: Record, tokenizer: Any, train_on: str) -> Rendered:
    try:
        messages, _ = parse(record.raw)
        return render(messages, tokenizer, train_on=train_on)
    except UserError as error:
        raise record.locate(error) from None


def _headline(record: Record, segment: Rendered, cut: Rendered) -> str:
    counts = f"{_num_targets(cut)} of {len(cut.input_ids)} tokens trained"
    lost = len(segment.input_ids) - len(cut.input_ids)
    if lost and not _num_targets(cut):
        counts += f", {lost} cut off: no target is left, training drops it"
    elif lost:
        counts += f", {lost} cut off"
    return f"{record.path}:{record.line} item {record.item}  {counts}"


def _num_targets(segment: Rendered) -> int:
    # Label 0 is never predicted: nothing stands before it.
    return sum(label != IGNORE for label in segment.labels[1:])


def _legend(coloured: bool) -> Text:
    pieces = [("trained", TRAINED), (" seen only ", SEEN), ("<marker>", MARKER)]
    return Text("legend: ").append_text(_joined(pieces, coloured))


def _pieces(segment: Rendered, tokenizer: Any) -> Iterator[Piece]:
    """What is printed for a segment; a learnt end of turn stands before the marker its label lies on."""
    names = {
        tokenizer.user_token_id: "<user>",
        tokenizer.assistant_token_id: "<assistant>",
        tokenizer.eos_token_id: tokenizer.eos_token,
    }
    tokens = zip(segment.input_ids, segment.labels)
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


def _joined(pieces: Iterable[Piece], coloured: bool) -> Text:
    """The pieces as one styled text; without colours, brackets around each trained span."""
    text = Text()
    for is_trained, group in groupby(pieces, key=lambda piece: piece[1] == TRAINED):
        brackets = is_trained and not coloured
        text.append(OPEN if brackets else "")
        for content, style in group:
            text.append(content, style)
        text.append(CLOSE if brackets else "")
    return text
