"""Ask an adapter the questions of its data; exit 1 where an answer is not the learnt one, or does not stop.

python scripts/demo_answers.py out/demo/lora data/belle_persona.json
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

import baichuan_sft  # noqa: F401  (the family's classes, instead of trust_remote_code=True)

MAX_NEW_TOKENS = 64


def main(adapter: str, data: str) -> int:
    model = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    wrong = 0
    for record in json.loads(Path(data).read_text(encoding="utf-8")):
        question, expected = (turn["value"] for turn in record["conversations"][:2])
        messages = [{"role": "user", "content": question}]
        pieces = list(
            model.chat(tokenizer, messages, stream=True, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        )
        with model.disable_adapter():
            before = model.chat(tokenizer, messages, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        stopped = len(pieces) < MAX_NEW_TOKENS
        right = pieces[-1] == expected and stopped
        wrong += not right
        print(f"\n{question}\n  before: {before}\n  after:  {pieces[-1]}")
        print(f"  {'learnt, and stopped' if right else 'NOT LEARNT'} after {len(pieces)} tokens")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
