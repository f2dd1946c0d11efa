"""The plan against real runs of two processes: bytes that DeepSpeed holds, bytes of a checkpoint on disk."""

import json
import sys

import pytest
from fixtures import ROOT
from held_bytes import SHAPE
from launching import deepspeed, flags, free_port, make_nano, run

from baichuan_sft import plan
from baichuan_sft.plan.flops import Shape, shape_of
from baichuan_sft.plan.simulate import LORA_RANK, checkpoint_bytes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    out = tmp_path_factory.mktemp("held")
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        2,
        "--master_port",
        free_port(),
    ]
    done = run([*launcher, ROOT / "tests" / "held_bytes.py", out])
    assert done.returncode == 0, done.stdout[-4000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("stage", range(4))
def test_states_are_those_that_deepspeed_holds(held, stage):
    """2 %: ranks' parts are padded, and norms and rotary tables are no part of the estimate."""
    config = Shape(**SHAPE, position_embedding="rope")
    parameters = plan.num_parameters(config)
    fields = dict(
        rows=1, row_tokens=16, num_trained=parameters, weight_bytes=2.0 * parameters, trained_bytes=2
    )
    fields |= dict(compute_bytes=2, stream_bytes=2, engine=True, bucket=config.hidden_size**2)
    memory = plan.estimate(config, plan.Step(**fields, stage=stage, world_size=2), "none")
    expected = memory.weights + memory.gradients + memory.optimizer
    # Between steps: fp32 gradients are there in stage 0's step only, whole weights in a pass of stage 3 only.
    expected -= {0: 4 * parameters, 3: memory.weights - parameters}.get(stage, 0)
    for rank in held:
        assert rank[str(stage)] == pytest.approx(expected, rel=0.02)


RUNS = {  # name -> method and recipe of the plan, flags
    "ddp": ("full", "ddp", {}),
    "zero1": ("full", "zero1", {"deepspeed": "zero1"}),
    "zero2": ("full", "zero2", {"deepspeed": "zero2"}),
    "zero3": ("full", "zero3", {"deepspeed": "zero3"}),
    "lora": ("lora", "zero2", {"deepspeed": "zero2", "use_lora": True, "lora_rank": LORA_RANK}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One update of each way, and its checkpoint."""
    root = tmp_path_factory.mktemp("saved")
    shape = ("--hidden_size", 256, "--intermediate_size", 688)
    common = dict(
        model_name_or_path=make_nano(root / "nano", *shape),
        data_path=ROOT / "data" / "belle_chat.json",
        cache_dir=root / "cache",
        max_steps=1,
        save_strategy="steps",
        save_steps=1,
        bf16=True,
        packing=False,
        model_max_length=64,
        per_device_train_batch_size=1,
        check_reload=False,
    )
    argvs = [flags(output_dir=root / name, **{**common, **extra}) for name, (_, _, extra) in RUNS.items()]
    (root / "runs.json").write_text(json.dumps(argvs))
    done = deepspeed(ROOT / "tests" / "many_runs.py", root / "runs.json")
    assert done.returncode == 0, done.stdout[-4000:]
    return root


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_is_as_large_as_planned(saved, name):
    """2 %, and 1 MB for what does not grow with the model: vocabulary, code, JSON, random states."""
    method, recipe, _ = RUNS[name]
    files = [path for path in (saved / name / "checkpoint-1").rglob("*") if path.is_file()]
    found = sum(path.stat().st_size for path in files)
    expected = checkpoint_bytes(shape_of(str(saved / "nano")), method, recipe)
    assert expected * 0.98 < found < expected * 1.02 + 1e6, {str(p): p.stat().st_size for p in files}
