"""`baichuan-sft COMMAND`: a table of commands, each imported only when it is called."""

from __future__ import annotations

import importlib
import io
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable

from baichuan_sft import __version__
from baichuan_sft.errors import UserError, pick
from baichuan_sft.streams import outlive_reader
from baichuan_sft.train import peers, signals, status

# A launcher ends all ranks when the first one ends; so long the one that speaks may take to find the same.
SPEAKER_SECONDS = 10.0

# name -> (module:function(argv) -> exit code, one line of help)
COMMANDS = {
    "train": ("baichuan_sft.train.sft:main", "fine-tune a model on conversations, all weights or LoRA"),
    "data": ("baichuan_sft.datatools.command:main", "check data files, or tokenise them before training"),
    "plan": ("baichuan_sft.plan.command:main", "what a run needs and how long it takes, without a GPU"),
    "preview": ("baichuan_sft.datatools.preview:preview", "show conversations as tokens, trained and not"),
    "launch": ("baichuan_sft.launch.command:main", "train on one or many hosts; when one fails, all end"),
    "doctor": ("baichuan_sft.doctor.command:main", "what keeps one or many hosts from training"),
    "eval": ("baichuan_sft.evaluate.command:main", "score a model, or several, on the family's benchmarks"),
    "serve": ("baichuan_sft.infer.server:main", "answer OpenAI's API for a model and its adapters"),
    "chat": ("baichuan_sft.infer.terminal:main", "talk to a model, an adapter or a checkpoint"),
    "web": ("baichuan_sft.infer.web:main", "talk to a model in the browser, or compare two"),
    "convert": ("baichuan_sft.export.convert:main", "check a model and write it in another form"),
    "quantize": ("baichuan_sft.export.quantize:main", "linear layers in 8 or 4 bits on disk, and their cost"),
    "inspect": ("baichuan_sft.export.inspect:main", "what a directory is, what it lacks, how to use it"),
    "merge": ("baichuan_sft.export.merge:main", "put an adapter into its base: one whole model"),
}

EXAMPLE = """example:
  baichuan-sft data check data/belle_chat.json
  baichuan-sft preview data/belle_chat.json --tokenizer data/tokenizer/baichuan2_like.model
  baichuan-sft train --model_name_or_path Baichuan2-7B-Base --data_path data/belle_chat.json --output_dir out
  baichuan-sft chat out

'baichuan-sft COMMAND --help' explains a command."""


def run(command: Callable[[list[str]], int], argv: list[str]) -> int:
    """Exit code of a command; what the user can repair becomes one line, without a traceback."""
    outlive_reader("stderr")
    # DeepSpeed says at every import, in every process, that there is no GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda entry: "accelerator to CPU" not in entry.getMessage())
    # bitsandbytes does, on some CPUs, of a kernel that it would fetch and that nothing here calls.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # What torch, transformers and DeepSpeed deprecate in each other is nothing a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.|transformers\.")
    rank = os.environ.get("RANK", "0")
    name = "error" if rank == "0" else f"error (rank {rank})"
    try:
        return command(argv)
    except UserError as error:
        status.fail(error, error.exit_code)
        # What every rank finds alike is said once: of flags and files on each host, of numbers by rank 0.
        speaker = {2: os.environ.get("LOCAL_RANK", "0"), 6: rank}.get(error.exit_code, "0") == "0"
        if not speaker and error.exit_code == 2 and not peers.watched():
            time.sleep(SPEAKER_SECONDS)  # ended by the launcher, once the one that speaks has ended
            speaker = True
        if speaker:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
        return leave(error.exit_code)
    except signals.Interrupted as error:
        status.fail(error, error.exit_code)
        if rank == "0" or not error.everywhere:
            signals.tell(error)
        return leave(error.exit_code)
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, as shells say
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        status.fail(error, 1)
        traceback.print_exc()
        return leave(1)


def leave(exit_code: int) -> int:
    """The exit code; inside a process group the process ends here, so that its launcher ends the others.

    Taking the group down in order would wait for ranks that wait for this one.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    return exit_code


def usage() -> str:
    lines = [f"  {name:9} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: baichuan-sft COMMAND ...", "", "commands:", *lines, "", EXAMPLE])


def dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(f"baichuan-sft {__version__}")
        return 0
    module, _, function = pick("command", argv[0], COMMANDS)[0].partition(":")
    return getattr(importlib.import_module(module), function)(argv[1:])


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show Chinese is no fault
    sys.exit(run(dispatch, sys.argv[1:]))


if __name__ == "__main__":
    main()
