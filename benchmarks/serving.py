"""Load on a server: concurrency against time to first token and throughput, and clients that leave.

baichuan-sft serve out/nano --port 8000 &
python benchmarks/serving.py http://127.0.0.1:8000/v1 nano
"""

import argparse
import asyncio
import os
import statistics
import time

import httpx
import openai

PROMPT = [{"role": "user", "content": "Tell me a long story about the sea. " * 4}]


async def one(client, model, max_tokens, leave_after=None):
    """Seconds to the first token, and number of chunks with text."""
    start, first, count = time.perf_counter(), None, 0
    stream = await client.chat.completions.create(
        model=model, messages=PROMPT, max_tokens=max_tokens, temperature=1, seed=1, stream=True
    )
    async with stream:
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.perf_counter() - start
                count += 1
                if count == leave_after:
                    break
    return first or time.perf_counter() - start, count


async def counter(url, name, headers):
    async with httpx.AsyncClient(headers=headers) as http:
        text = (await http.get(url.removesuffix("/v1") + "/metrics")).text
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(name + " "))


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--max_tokens", type=int, default=64)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    args = parser.parse_args()
    key = os.environ.get("BAICHUAN_SFT_API_KEY", "none")
    client = openai.AsyncOpenAI(base_url=args.url, api_key=key, max_retries=0)
    generated = "baichuan_sft_generated_tokens_total"
    headers = {"authorization": f"Bearer {key}"}
    await one(client, args.model, args.max_tokens)  # warm
    print("| at once | first token, median s | slowest s | tokens/s |\n|---|---|---|---|")
    for size in args.concurrency:
        before, start = await counter(args.url, generated, headers), time.perf_counter()
        results = await asyncio.gather(*(one(client, args.model, args.max_tokens) for _ in range(size)))
        seconds = time.perf_counter() - start
        firsts = [first for first, _ in results]
        speed = (await counter(args.url, generated, headers) - before) / seconds
        print(f"| {size} | {statistics.median(firsts):.3f} | {max(firsts):.3f} | {speed:.0f} |")
    before = await counter(args.url, generated, headers)
    results = await asyncio.gather(*(one(client, args.model, 2000, leave_after=3) for _ in range(4)))
    await asyncio.sleep(1)
    tokens = await counter(args.url, generated, headers) - before
    read = sum(count for _, count in results)
    print(f"\n4 clients left after 3 chunks: {read} read, {tokens} tokens generated of 8000 asked for")


if __name__ == "__main__":
    asyncio.run(main())
