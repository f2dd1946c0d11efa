"""Items per second of `baichuan-sft eval` against plain lm-eval: the same model, prompts and choices.

python scripts/make_nano.py out/nano --hidden_size 512 --num_hidden_layers 8 --num_attention_heads 8
python benchmarks/evaluate.py out/nano --data_dir data/eval --tasks cmmlu,mmlu,gsm8k

lm-eval's HFLM is given what our prompters ask, in one call for each task, so that it may sort and batch as it
likes; its batch size is the best of those given. Times are CPU-seconds beside seconds: machines are shared.
"""

import argparse
import logging
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from baichuan_sft.evaluate import data, runner
from baichuan_sft.evaluate.benchmarks import BENCHMARKS
from baichuan_sft.evaluate.items import Settings, letter
from baichuan_sft.evaluate.models import open_model
from baichuan_sft.evaluate.scorer import Scorer


def timed(function):
    """What it returns, seconds, CPU-seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def ours(opened, requests):
    """Letters or texts, from the texts on: tokenised, planned, run."""
    scorer = Scorer(opened.model, opened.tokenizer)
    found = {}
    for batch in scorer.plan(requests):
        found |= dict(zip(batch, scorer.run([requests[i] for i in batch])))
    responses = [found[i] for i in range(len(requests))]
    return [letter(r.scores) if r.scores else r.texts[0] for r in responses], sum(r.tokens for r in responses)


def theirs(opened, requests, batch_size):
    model = HFLM(
        pretrained=opened.model,
        tokenizer=opened.tokenizer,
        backend="causal",
        batch_size=batch_size,
        max_length=opened.model.config.context_length,
        add_bos_token=False,
    )
    if requests[0].choices:
        calls = [
            Instance("loglikelihood", {}, (request.text, choice), i)
            for i, request in enumerate(requests)
            for choice in request.choices
        ]
        scores = iter([score for score, _ in model.loglikelihood(calls, disable_tqdm=True)])
        return [letter([next(scores) for _ in request.choices]) for request in requests]
    calls = []
    for i, request in enumerate(requests):
        settings = {"until": list(request.stop), "max_gen_toks": request.max_new_tokens, "do_sample": False}
        calls.append(Instance("generate_until", {}, (request.text, settings), i))
    return model.generate_until(calls, disable_tqdm=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--tasks", default="cmmlu,mmlu,gsm8k")
    parser.add_argument("--style", default="baichuan", choices=runner.STYLES)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="fp32")
    args = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    opened = open_model(args.model, dtype=args.dtype, device=args.device)
    print(f"{opened.facts['variant']}, {opened.facts['parameters']:,} parameters")
    print("| task | items | tokens | items/s: ours | HFLM | CPU-s: ours | HFLM | faster by | same |")
    print("|---|---|---|---|---|---|---|---|---|")
    for task in args.tasks.split(","):
        settings = Settings()
        loaded = data.draw(data.load(task, args.data_dir, settings), args.limit, 0)
        asker = Scorer(opened.model, opened.tokenizer)
        questions, _ = runner.ask(BENCHMARKS[task], args.style, loaded, asker, settings)
        requests = [question.request for question in questions]
        # A likelihood of every choice, which both can tell, and answers of one length.
        requests = [
            replace(r, by="loglikelihood", max_new_tokens=min(r.max_new_tokens, args.max_new_tokens))
            for r in requests
        ]
        ours(opened, requests[:8])  # warm
        (answers, tokens), wall, cpu = timed(lambda asked=requests: ours(opened, asked))
        runs = [
            timed(lambda asked=requests, size=size: theirs(opened, asked, size)) for size in args.batch_sizes
        ]
        expected, other_wall, other_cpu = min(runs, key=lambda run: run[2])
        same = sum(a == b for a, b in zip(answers, expected))
        num = len(requests)
        print(
            f"| {task} | {num} | {tokens:,} | {num / wall:.1f} | {num / other_wall:.1f} | {cpu:.1f} | "
            f"{other_cpu:.1f} | **{other_cpu / cpu:.1f}** | {same} of {num} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
