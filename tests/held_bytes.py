"""Run by torchrun: what DeepSpeed's ranks hold at each ZeRO stage, as JSON. python ... held_bytes.py OUT"""

import gc
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import deepspeed
import torch
from fixtures import tiny_config

from baichuan_sft import BaichuanForCausalLM

# Wide and deep enough that weights decide, and not what the engine allocates for itself.
SHAPE = dict(
    hidden_size=256, intermediate_size=688, num_attention_heads=4, vocab_size=2048, num_hidden_layers=4
)


def held() -> int:
    """Bytes of all tensors alive in this process, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        try:
            if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
                # a gradient that no Python code has looked at is no object of Python's
                for tensor in (thing, thing.grad if thing.is_leaf else None):
                    if tensor is not None:
                        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        except Exception:  # proxies of modules that were never imported
            continue
    return sum(storages.values())


def settled() -> int:
    """Bytes once two looks agree: gloo's threads let go of what they reduced a moment after it is there."""
    before, now = -1, held()
    while now != before:
        time.sleep(0.2)
        before, now = now, held()
    return now


def after_backward(stage: int) -> int:
    """Weights, gradients and states, the most of two micro-steps; activations are gone after backward."""
    before = held()
    torch.manual_seed(0)
    model = BaichuanForCausalLM(tiny_config("baichuan2-7b", **SHAPE)).bfloat16()
    zero = {"stage": stage, "reduce_bucket_size": SHAPE["hidden_size"] ** 2, "contiguous_gradients": True}
    zero |= {"use_multi_rank_bucket_allreduce": False} if stage < 3 else {}
    zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0} if stage == 3 else {}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=list(model.parameters()))
    ids = torch.randint(3, SHAPE["vocab_size"], (1, 16))
    most = 0
    for micro_step in range(4):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        if micro_step >= 2:  # the first update makes the states
            most = max(most, settled() - before)
        engine.step()
    engine.destroy()
    return most


def main() -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # minutes to compile, never called
    deepspeed.init_distributed("gloo")
    rank = torch.distributed.get_rank()
    found = {stage: after_backward(stage) for stage in range(4)}
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
