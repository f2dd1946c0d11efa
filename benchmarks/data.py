"""Data: megabytes checked and tokens made per CPU-second, and what a cached epoch costs.

python benchmarks/data.py check FILE [--gib 1]        1,000 seeded errors: all found? throughput, memory
python benchmarks/data.py tokenise FILE TOKENIZER     against the vendor's way: one message at a time, padded

FILE holds conversations in the Belle format. Times are CPU-seconds of this process and its children: the
wall clock of a shared machine says little.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ERRORS = 1000


def cpu_seconds() -> float:
    """Of this process and of its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


# --- check ----------------------------------------------------------------------------------------


def breakages(rng: random.Random, line: bytes) -> bytes:
    """One record, broken in one of the ways the catalogue knows."""
    record = json.loads(line)
    turns = record["conversations"]
    ways = [
        lambda: turns[rng.randrange(len(turns))].update(value=None),
        lambda: turns[rng.randrange(len(turns))].update({"from": "humna"}),
        lambda: turns[rng.randrange(len(turns))].pop("value"),
        lambda: turns[1].update(value=""),
        lambda: record.update(conversations=[]),
        lambda: record.pop("conversations"),
        lambda: turns.insert(0, turns[0]),
    ]
    way = rng.randrange(len(ways) + 2)
    if way < len(ways):
        ways[way]()
        return json.dumps(record, ensure_ascii=False).encode()
    return line[: len(line) // 2] if way == len(ways) else line[:40] + b"\xff" + line[40:]


def write_lines(source: Path, target: Path, size: int, seed: int) -> list[int]:
    """JSON Lines of ``size`` bytes, every record another one; the line numbers of the broken ones."""
    rng = random.Random(seed)
    records = json.loads(source.read_text(encoding="utf-8"))
    lines = [json.dumps(record, ensure_ascii=False).encode() for record in records]
    total = size * len(lines) // sum(len(line) + 1 for line in lines)
    broken = set(rng.sample(range(total), ERRORS))
    with target.open("wb") as file:
        for number in range(total):
            line = lines[number % len(lines)].replace(b'"value": "', b'"value": "%d ' % number, 1)
            file.write((breakages(rng, line) if number in broken else line) + b"\n")
    return sorted(number + 1 for number in broken)


def check(source: Path, size: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path, out = Path(directory, "big.jsonl"), Path(directory, "out")
        broken = write_lines(source, path, size, seed=1)
        before = cpu_seconds()
        command = [sys.executable, "-m", "baichuan_sft.cli", "data", "check", path, "--output_dir", out]
        command += ["--preprocessing_num_workers", 1, "--cache_dir", Path(directory, "cache")]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        seconds = cpu_seconds() - before
        report = [json.loads(line) for line in (out / "data_report.jsonl").read_text().splitlines()]
        found = [entry["line"] for entry in report if entry["severity"] == "ERROR"]
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        megabytes = path.stat().st_size / 1e6
    print(
        f"exit code {done.returncode}; {len(set(found) & set(broken))} of {len(broken)} errors found, ",
        end="",
    )
    print(f"{len(set(found) - set(broken))} others; {re.search(r'read .*', done.stdout)[0]}")
    speed = f"{megabytes / seconds:.0f} MB/s; peak {peak:.0f} MiB"
    print(f"{megabytes:.0f} MB in {seconds:.1f} CPU-seconds: {speed}")


# --- tokenise -------------------------------------------------------------------------------------


def vendor_item(conversation: list[dict[str, str]], tokenizer, max_length: int = 512):
    """One item as the vendor's fine-tune.py makes it in ``__getitem__``: message by message, padded."""
    import torch

    input_ids: list[int] = []
    labels: list[int] = []
    for turn in conversation:
        ids = tokenizer.encode(turn["value"])
        is_user = turn["from"] == "human"
        input_ids += [195 if is_user else 196, *ids]
        labels += [2, *[-100] * len(ids)] if is_user else [-100, *ids]
    input_ids, labels = [*input_ids, 2][:max_length], [*labels, 2][:max_length]
    input_ids += [0] * (max_length - len(input_ids))
    labels += [-100] * (max_length - len(labels))
    tensor = torch.LongTensor(input_ids)
    return {"input_ids": tensor, "labels": torch.LongTensor(labels), "attention_mask": tensor.ne(0)}


def tokenise(source: Path, vocabulary: Path, rounds: int = 3) -> None:
    from baichuan_sft.data.check import Rules
    from baichuan_sft.data.dataset import build_dataset
    from baichuan_sft.model.tokenization_baichuan import BaichuanTokenizer

    tokenizer = BaichuanTokenizer(vocab_file=str(vocabulary))
    conversations = [record["conversations"] for record in json.loads(source.read_text(encoding="utf-8"))]
    part = conversations[:1000]
    print("tokens per CPU-second: the vendor's way, here (checked, tokenised, written), here from the cache")
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            before = cpu_seconds()
            tokens = sum(int(vendor_item(turns, tokenizer)["attention_mask"].sum()) for turns in part)
            vendor = tokens / (cpu_seconds() - before)
            before = cpu_seconds()
            data = build_dataset([source], tokenizer, Rules(max_length=512), cache_dir=cache)
            ours = data.report.tokens / (cpu_seconds() - before)
            before = cpu_seconds()
            data = build_dataset([source], tokenizer, Rules(max_length=512), cache_dir=cache)
            opened = cpu_seconds() - before
            before = cpu_seconds()
            read = sum(len(data.train[i]["input_ids"]) for i in range(len(data.train)))
            cached = read / (cpu_seconds() - before)
        print(
            f"{vendor:,.0f}  {ours:,.0f} ({ours / vendor:.1f}x)  {cached:,.0f} ({cached / vendor:.0f}x)",
            end="",
        )
        print(f"; opening the cache: {1000 * opened:.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["check", "tokenise"])
    parser.add_argument("file", type=Path)
    parser.add_argument("tokenizer", type=Path, nargs="?")
    parser.add_argument("--gib", type=float, default=1.0)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.what == "check":
        check(args.file, int(args.gib * 2**30))
    else:
        tokenise(args.file, args.tokenizer)


if __name__ == "__main__":
    main()
