"""Real ranks: resumed runs of each ZeRO stage are bit-identical, and on other ranks take the same rows."""

import itertools
import json
import subprocess

import pytest
from fixtures import ROOT
from launching import deepspeed, flags, log_of, make_nano

from baichuan_sft.commit import sha256_of
from baichuan_sft.train import universal
from baichuan_sft.train.signals import Interrupted

pytestmark = pytest.mark.slow

STAGES = [None, 0, 1, 2, 3]  # None: without DeepSpeed
KINDS = ["full", "lora"]
CASES = list(itertools.product(STAGES, KINDS))
STEPS = 5
# The third update ends in the middle of a packed run's second epoch, the second at the end of its first.
STARTS = [(3, stage, kind) for stage, kind in CASES] + [(2, None, "lora"), (2, 0, "full"), (2, 3, "full")]

# What differs from stage to stage, so that each way of dealing rows is met. All draw random numbers.
ROWS = {
    None: dict(packing=True, packing_tokens=128),
    0: dict(packing=True, packing_tokens=128, num_train_epochs=2.5, max_steps=-1),
    1: dict(streaming=True, packing=True, packing_tokens=128),
    2: dict(packing=False, train_sampling_strategy="group_by_length"),
    3: dict(packing=True, packing_tokens=128),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


def launch(root, processes, plans):
    """name -> options; all runs in one launch, into directories of their names."""
    for stage in STAGES[1:]:
        config = json.loads((ROOT / "ds_config.json").read_text())
        zero = {"stage": stage} if stage < 3 else config["zero_optimization"]
        (root / f"zero{stage}.json").write_text(json.dumps({**config, "zero_optimization": zero}))
    if not (root / "nano").exists():
        make_nano(root / "nano", "--hidden_size", 32, "--intermediate_size", 48)
    common = dict(
        model_name_or_path=root / "nano",
        data_path=ROOT / "data" / "belle_chat.json",
        cache_dir=root / "cache",
        model_max_length=64,
        max_steps=STEPS,
        learning_rate=1e-3,
        save_strategy="steps",
        save_steps=1,
        check_reload=False,
        seed=7,
    )
    runs = [flags(output_dir=root / name, **{**common, **options}) for name, options in plans.items()]
    file = root / f"runs-{len(list(root.glob('runs-*')))}.json"
    file.write_text(json.dumps(runs))
    done = deepspeed(ROOT / "tests" / "many_runs.py", file, processes=processes)
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def name_of(stage, kind):
    return f"{'ddp' if stage is None else f'zero{stage}'} {kind}"


def setting(root, stage, kind):
    lora = dict(use_lora=True, lora_rank=4) if kind == "lora" else {}
    return lora if stage is None else dict(lora, deepspeed=root / f"zero{stage}.json")


def weights(directory):
    (file,) = [*directory.glob("model.safetensors"), *directory.glob("adapter_model.safetensors")]
    return sha256_of(file)


# --- the same ranks ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def same_ranks(root):
    """Runs of two ranks to their end, and again, in other processes, from two of their checkpoints."""
    straight, resumed = {}, {}
    for stage, kind in CASES:
        noise = dict(lora_dropout=0.1) if kind == "lora" else dict(neftune_noise_alpha=5.0)
        options = setting(root, stage, kind) | ROWS[stage] | noise
        options |= dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
        name = name_of(stage, kind)
        straight[name] = options
        for step in [start for start, *case in STARTS if case == [stage, kind]]:
            resumed[f"{name} from {step}"] = options | dict(resume=root / name / f"checkpoint-{step}")
    launch(root, 2, straight)
    launch(root, 2, resumed)
    return root


@pytest.mark.parametrize("start, stage, kind", STARTS)
def test_a_resumed_run_goes_on_bit_for_bit(same_ranks, start, stage, kind):
    straight, resumed = same_ranks / name_of(stage, kind), same_ranks / f"{name_of(stage, kind)} from {start}"
    assert [row["step"] for row in log_of(resumed)] == list(range(start + 1, STEPS + 1))
    for one, other in zip(log_of(straight)[start:], log_of(resumed)):
        for number in ("loss", "grad_norm", "learning_rate"):
            assert one[number].hex() == other[number].hex(), (number, one, other)
    assert weights(straight) == weights(resumed)
    assert len({row["loss"] for row in log_of(straight)}) == STEPS


# --- other ranks ------------------------------------------------------------------------------------

FEW = [(None, "full"), (2, "full"), (3, "full"), (3, "lora")]
MOVES = {(2, 1): CASES, (1, 2): FEW, (2, 4): FEW[1:3], (2, 3): FEW[1:3]}  # 8 rows are no multiple of 3 x 2
TRIED = [(move, stage, kind) for move, cases in MOVES.items() for stage, kind in cases]


@pytest.fixture(scope="module")
def other_ranks(root):
    """Runs of one and of two ranks, and from the middle of each on another number: 8 rows per update."""

    def options(stage, kind, first):
        lora = dict(lora_dropout=0.0) if kind == "lora" else {}
        cut = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4 // first)
        return setting(root, stage, kind) | lora | cut | dict(packing=True, packing_tokens=128, save_steps=3)

    for ranks, cases in ((2, CASES), (1, FEW)):
        launch(root, ranks, {f"{name_of(*case)} on {ranks}": options(*case, ranks) for case in cases})
    for (first, then), cases in MOVES.items():
        plans = {}
        for case in cases:
            name = f"{name_of(*case)} on {first}"
            plans[f"{name} then {then}"] = options(*case, first) | dict(resume=root / name / "checkpoint-3")
        launch(root, then, plans)
    return root


@pytest.mark.parametrize("move, stage, kind", TRIED)
def test_another_number_of_ranks_takes_the_same_rows(other_ranks, move, stage, kind):
    first, then = move
    name = f"{name_of(stage, kind)} on {first}"
    straight, resumed = log_of(other_ranks / name)[3:], log_of(other_ranks / f"{name} then {then}")
    assert [row["step"] for row in resumed] == [4, 5]
    for one, other in zip(straight, resumed):
        # fp32 sums in another order
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    assert not list(other_ranks.glob("*/universal-*"))


def test_a_conversion_ends_with_the_run_that_asked_for_it(monkeypatch):
    """It would write on into a directory that the next run removes."""

    def interrupted(code):
        raise Interrupted("SIGTERM", 143)

    monkeypatch.setattr(universal, "gather", interrupted)
    monkeypatch.setattr(universal, "PATIENCE", 0.1)
    running = subprocess.Popen(["sleep", "6000"])
    with pytest.raises(Interrupted):
        universal._wait(running)
    assert running.returncode == -9
