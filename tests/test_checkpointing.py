"""Activation checkpointing: every level gives the same numbers, and the one that fits is chosen."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from fixtures import ARCHES, ROOT, tiny_config
from launching import deepspeed, flags, log_of, make_nano
from test_plan import TOKENS, build

from baichuan_sft import BaichuanForCausalLM
from baichuan_sft.attention import BACKENDS
from baichuan_sft.errors import EnvironmentFault, UserError
from baichuan_sft.machine import host_memory
from baichuan_sft.plan import GIB, LEVELS
from baichuan_sft.train import checkpointing
from baichuan_sft.train.adapters import add_lora
from baichuan_sft.train.args import LoraArguments
from baichuan_sft.train.checkpointing import apply, choose, probe
from baichuan_sft.train.fused import compile_blocks
from baichuan_sft.train.parse import parse

REQUIRED = flags(
    model_name_or_path=ROOT / "tests/golden/baichuan-7b/a", data_path=ROOT / "data" / "belle_chat.json"
)
IDS = torch.arange(2 * 48).view(2, 48) % 300 + 3
POSITIONS = torch.cat([torch.arange(20), torch.arange(28)]).expand(2, -1)  # two conversations per row


def model_of(arch, lora, attention="sdpa", target="all-linear"):
    torch.manual_seed(0)
    config = tiny_config(arch, vocab_size=512)
    config._attn_implementation = attention
    model = BaichuanForCausalLM(config).train()
    if not lora:
        return model
    options = dict(lora_rank=4, lora_alpha=8, lora_dropout=0.1, lora_target=target)
    return add_lora(model, LoraArguments(use_lora=True, init_lora_weights="gaussian", **options))


def loss_and_gradients(model, level, **options):
    apply(model, level, **options)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)  # LoRA's dropout
    loss = model(input_ids=IDS, labels=IDS, position_ids=POSITIONS).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, levels=LEVELS, stages=(0,)):
    loss, gradients = loss_and_gradients(model, "none")
    assert len(gradients) == sum(p.requires_grad for p in model.parameters())
    for level in levels:
        for stage in stages:
            other, recomputed = loss_and_gradients(model, level, zero_stage=stage)
            assert other == loss
            assert gradients.keys() == recomputed.keys()
            # Bit for bit: the same kernels run a second time on the same numbers, dropout's mask included.
            assert all(torch.equal(gradient, recomputed[name]) for name, gradient in gradients.items())


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("arch", ARCHES)
def test_levels_change_nothing(arch, lora):
    assert_same(model_of(arch, lora), stages=(0, 3))


@pytest.mark.parametrize("target", ["W_pack", "down_proj", "W_pack,up_proj"])
def test_levels_change_nothing_for_any_adapters(target):
    assert_same(model_of("baichuan-7b", True, target=target))


@pytest.mark.parametrize("attention", [n for n, b in BACKENDS.items() if not b.why_not("cpu", torch.float32)])
@pytest.mark.parametrize("arch", ["baichuan-7b", "baichuan2-13b"])
def test_levels_change_nothing_for_any_attention(arch, attention):
    assert_same(model_of(arch, False, attention))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_full_works_on_compiled_blocks(lora):
    model = model_of("baichuan-7b", lora, target="W_pack")
    compile_blocks(model, "aot_eager")
    assert_same(model, ("none", "full"))


def test_selective_runs_no_product_and_no_attention_twice():
    counts = {level: operations(model_of("baichuan-7b", False), level) for level in LEVELS}
    layers = 2
    for op, twice in (("aten::mm", 5), ("aten::_scaled_dot_product_flash_attention_for_cpu", 1)):
        assert counts["selective"][op] == counts["none"][op] > 0
        # full stops before down_proj, whose result backward does not read
        assert counts["full"][op] == counts["none"][op] + layers * (twice - (op == "aten::mm"))
    assert counts["selective"]["aten::rsqrt"] == counts["full"]["aten::rsqrt"] == 2 * layers + 2 * layers + 1


def operations(model, level):
    from collections import Counter

    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counts[func.name()] += 1
            return func(*args, **(kwargs or {}))

    counts = Counter()
    with Count():
        loss_and_gradients(model, level)
    return counts


def test_lora_goes_no_further_down_than_its_first_adapter():
    """The embedding's output needs no gradient; the reentrant kind, which needs one there, gives the same."""
    model = model_of("baichuan-7b", True)
    seen = []
    model.get_base_model().model.layers[0].register_forward_pre_hook(
        lambda layer, inputs: seen.append(inputs[0].requires_grad)
    )
    gradients = [loss_and_gradients(model, level)[1] for level in LEVELS]
    assert seen[:3] == [False] * 3
    reentrant = loss_and_gradients(model, "full", zero_stage=3)[1]
    assert reentrant.keys() == gradients[0].keys() and len(reentrant) > 0
    assert all(torch.equal(reentrant[name], gradients[0][name]) for name in reentrant)


# --- choosing ---------------------------------------------------------------------------------------

NEEDS = {"none": 10.0, "selective": 6.0, "full": 2.0}


@pytest.mark.parametrize(
    "budget, measured, expected, tried",
    [
        (11, None, ("none", 10), []),
        (10, None, ("none", 10), []),
        (9, None, ("selective", 6), []),
        (5, None, ("full", 2), []),
        (1, None, ("full", 2), []),  # what does not fit is still taken, with a warning
        (11, NEEDS, ("none", 10), ["none"]),
        (11, NEEDS | {"none": 12.0}, ("selective", 6), ["none", "selective"]),
        (11, NEEDS | {"none": math.inf}, ("selective", 6), ["none", "selective"]),
        (9, NEEDS | {"selective": math.inf}, ("full", 2), ["selective", "full"]),
        (9, dict.fromkeys(NEEDS, math.inf), ("full", math.inf), ["selective", "full"]),
        (1, NEEDS | {"full": 0.5}, ("full", 0.5), ["full"]),
    ],
)
def test_the_first_level_that_fits_is_chosen(budget, measured, expected, tried):
    asked = []

    def measure(level):
        asked.append(level)
        return measured[level]

    assert choose(LEVELS, NEEDS, budget, measure if measured else None) == expected
    assert asked == tried


def test_a_probe_step_leaves_nothing_behind():
    model, _, step, _ = build("baichuan2-7b", "lora fp32", 2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    random = torch.get_rng_state()
    ran = []

    def peak(run):
        run()
        ran.append(True)
        assert all(p.grad is None for p in model.parameters())  # dropped as they come
        return 123.0

    assert probe(model, step, "selective", None, peak) == 123.0 and ran
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters() if p.requires_grad)


def test_a_probe_step_that_runs_out_of_memory_is_infinite():
    model, _, step, _ = build("baichuan2-7b", "full fp32", 2)

    def peak(run):
        run()
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert probe(model, step, "none", None, peak) == math.inf
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match="a bug"):  # no other failure is taken for that
        probe(model, step, "none", None, lambda run: (_ for _ in ()).throw(RuntimeError("a bug")))


def settings_for(asked, compiled=False):
    return SimpleNamespace(
        model=SimpleNamespace(checkpointing=asked),
        data=SimpleNamespace(model_max_length=TOKENS),
        lora=SimpleNamespace(lora_rank=8, lora_dropout=0.0),
        training={"deepspeed": None, "torch_compile": compiled},
        row_shape=lambda: (TOKENS, 1),
    )


def prepared(monkeypatch, asked="auto", free=GIB, probes=None, compiled=False):
    """What a run says, and the level on its layers; ``probes`` stands in for a GPU's probe steps."""
    model, _, _, _ = build("baichuan-7b", "full fp32", 2)
    args = SimpleNamespace(
        bf16=False, fp16=False, world_size=1, optim="adamw_torch", device=torch.device("cpu")
    )
    monkeypatch.setattr(checkpointing, "free_bytes", lambda device, weight_bytes: free)
    if probes is not None:
        monkeypatch.setattr(checkpointing, "no_probe", lambda step, device: None)
        monkeypatch.setattr(checkpointing, "probe", lambda model, step, level, *rest: probes[level])
    level = checkpointing.prepare(model, settings_for(asked, compiled), args)
    return level, model.model.layers[1].gradient_checkpointing


def test_the_log_says_what_was_chosen_and_why(monkeypatch, capsys):
    assert prepared(monkeypatch) == ("none", False)
    said = capsys.readouterr().out
    assert re.match(r"checkpointing: none \(needs about 0\.0\d+ of 1\.0 GiB: weights 0\.00\d+, ", said), said
    assert prepared(monkeypatch, free=GIB // 1000) == ("full", True)
    said = capsys.readouterr().out
    assert "auto, no probe step on a CPU)" in said and "warning: memory may run out" in said
    assert prepared(monkeypatch, "selective") == ("selective", True)
    assert "as asked)" in capsys.readouterr().out


def test_a_probe_step_decides_where_it_can_be_had(monkeypatch, capsys):
    assert prepared(monkeypatch, probes={"none": math.inf, "selective": 0.0}) == ("selective", True)
    assert "auto, measured in a probe step)" in capsys.readouterr().out
    found = {"none": math.inf, "full": 0.0}
    assert prepared(monkeypatch, probes=found, compiled=True) == ("full", True)
    with pytest.raises(EnvironmentFault, match=r"1 x 128 tokens does not fit into .* GiB even with"):
        prepared(monkeypatch, probes=dict.fromkeys(LEVELS, math.inf))


def test_memory_of_a_container_counts_where_it_is_less(tmp_path):
    assert min(host_memory(tmp_path)) > 1 << 20  # without /proc: not Linux
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 16384 kB\nMemFree: 1 kB\nMemAvailable: 8192 kB\n")
    assert host_memory(tmp_path) == (16384 * 1024, 8192 * 1024)
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    assert host_memory(tmp_path) == (16384 * 1024, 8192 * 1024)
    (group / "memory.max").write_text(f"{4 << 20}\n")
    (group / "memory.current").write_text(f"{3 << 20}\n")
    (group / "memory.stat").write_text(f"anon 1\ninactive_file {1 << 20}\n")  # what can be given back
    assert host_memory(tmp_path) == (4 << 20, 2 << 20)


# --- flags ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, level",
    [
        ("", "auto"),
        ("--gradient_checkpointing True", "full"),
        ("--gradient_checkpointing", "full"),
        ("--activation-checkpointing=False", "none"),
        ("--checkpointing selective", "selective"),
        ("--gradient_checkpointing True --checkpointing full", "full"),
        ("--checkpointing full --activation_checkpointing True --gradient_checkpointing True", "full"),
    ],
)
def test_older_switches_are_levels(words, level, tmp_path):
    settings = parse([*REQUIRED, "--output_dir", str(tmp_path), *words.split()])
    assert settings.model.checkpointing == level
    assert any("is called --checkpointing" in notice for notice in settings.notices) == (
        "ient_" in words or "ion" in words
    )
    assert not settings.training["gradient_checkpointing"]


@pytest.mark.parametrize(
    "words, message",
    [
        ("--checkpointing none --gradient_checkpointing True", "--checkpointing is given twice"),
        ("--gradient_checkpointing maybe", "--gradient_checkpointing: 'maybe' is neither True nor False"),
        ("--gradient_checkpointing_kwargs {}", "--checkpointing chooses the kind that works"),
        ("--checkpointing some", "invalid choice: 'some'"),
        ("--checkpointing selective --torch_compile True", "not possible with --torch_compile True"),
    ],
)
def test_what_is_said_in_two_ways_is_refused(words, message, tmp_path):
    with pytest.raises(UserError, match=message):
        parse([*REQUIRED, "--output_dir", str(tmp_path), *words.split()])


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_levels_agree_under_zero3_on_two_processes(lora, tmp_path):
    nano = make_nano(tmp_path / "nano")
    logs = []
    for level in LEVELS:
        words = dict(model_name_or_path=nano, data_path=ROOT / "data" / "belle_chat.json", use_lora=lora)
        words |= dict(
            output_dir=tmp_path / level, checkpointing=level, check_reload=False, save_strategy="no"
        )
        words |= dict(
            deepspeed=ROOT / "ds_config.json",
            max_steps=3,
            seed=5,
            model_max_length=256,
            per_device_train_batch_size=1,
        )
        done = deepspeed(ROOT / "fine-tune" / "fine-tune.py", *flags(**words))
        assert done.returncode == 0, done.stdout[-4000:]
        assert f"checkpointing: {level} (needs about" in done.stdout
        logs.append([(row["loss"], row["grad_norm"]) for row in log_of(tmp_path / level)])
    # ranks may add gradients in another order: fp32 rounding
    for rows in zip(*logs):
        for other in rows[1:]:
            assert other == pytest.approx(rows[0], rel=1e-5)
