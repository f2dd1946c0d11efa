"""Fused elementwise work changes no number and no file, and says at the start where it cannot run."""

import sys

import pytest
import torch
from fixtures import ARCHES, tiny_config
from launching import flags, log_of, make_nano, run
from torch._dynamo.utils import counters

from baichuan_sft.errors import EnvironmentFault, UserError
from baichuan_sft.model.modeling_baichuan import BaichuanForCausalLM
from baichuan_sft.train import checkpointing, fused
from baichuan_sft.train.adapters import add_lora
from baichuan_sft.train.args import LoraArguments
from baichuan_sft.train.parse import parse

# Sums of a few hundred fp32 numbers in another order, over three layers and back: some 100 roundings
# of 6e-8; Liger's kernels in Triton's interpreter missed by 5e-7.
RELATIVE = 2e-5
# (rows, tokens, where the second conversation of a row begins)
SHAPES = [(2, 24, 8), (2, 40, 9), (3, 17, 16), (2, 33, 1)]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()


def tiny(arch, lora="", attn="segments", dropout=0.0):
    torch.manual_seed(0)
    model = BaichuanForCausalLM._from_config(tiny_config(arch, num_hidden_layers=3), attn_implementation=attn)
    if lora:
        model = add_lora(
            model, LoraArguments(lora_rank=4, lora_alpha=32, lora_dropout=dropout, lora_target=lora)
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at the start, where A would have no gradient
                torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


def packed(num_rows, num_tokens, cut, device="cpu"):
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.randint(300, 6000, (num_rows, num_tokens), generator=generator)
    positions = torch.cat([torch.arange(cut), torch.arange(num_tokens - cut)]).expand(num_rows, -1)
    return {k: v.to(device) for k, v in dict(input_ids=ids, labels=ids, position_ids=positions).items()}


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    named = model.named_parameters()
    return loss.item(), {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_equal(got, wanted, relative):
    assert got[0] == pytest.approx(wanted[0], rel=relative)
    assert got[1].keys() == wanted[1].keys() and wanted[1]
    for name, grad in wanted[1].items():
        assert (got[1][name] - grad).abs().max() <= relative * grad.abs().max(), name


# --- torch.compile ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", ["", "W_pack"], ids=["full", "lora"])
@pytest.mark.parametrize("arch", ARCHES)
def test_compiled_is_equal_and_compiles_once(arch, lora):
    """Dynamo captures for any backend the same; what inductor makes of it is the slow test below."""
    model = tiny(arch, lora)
    batches = [packed(*shape) for shape in SHAPES]
    wanted = [loss_and_gradients(model, batch) for batch in batches]
    names = list(model.state_dict())
    fused.compile_blocks(model, "eager")
    assert list(model.state_dict()) == names
    num_graphs = []
    for batch, one in zip(batches, wanted):
        assert_equal(loss_and_gradients(model, batch), one, RELATIVE)
        num_graphs.append(counters["stats"]["unique_graphs"])
    # Two halves of a block, round attention; LoRA's first block has an input without a gradient. Above 8
    # variants of one function torch would give up and run it eagerly.
    assert 2 <= num_graphs[0] <= 8
    assert num_graphs == [num_graphs[0]] * len(batches)


@pytest.mark.parametrize("level", ["full", "selective"])
def test_blocks_are_compiled_under_checkpointing_too(level):
    """block.compile() would compile nothing there: torch runs such a checkpoint eagerly, without a word."""
    model, batch = tiny("baichuan2-7b"), packed(*SHAPES[0])
    checkpointing.apply(model, level)
    wanted = loss_and_gradients(model, batch)
    assert not counters["stats"]
    fused.compile_blocks(model, "eager")
    assert_equal(loss_and_gradients(model, batch), wanted, RELATIVE)
    assert counters["stats"]["unique_graphs"] >= 2


@pytest.mark.slow
def test_a_run_trains_compiled_as_it_does_eagerly(tmp_path):
    nano = make_nano(tmp_path / "nano")
    common = flags(model_name_or_path=nano, data_path="data/belle_chat.json#64", max_steps=3, use_cpu=True)
    common += flags(model_max_length=128, save_strategy="no", check_reload=False, learning_rate=1e-3)
    logs = []
    for name, words in (("plain", []), ("compiled", flags(torch_compile=True))):
        command = [sys.executable, "-m", "baichuan_sft.cli", "train", *common, *words]
        done = run([*command, *flags(output_dir=tmp_path / name)])
        assert done.returncode == 0, done.stdout
        logs.append([row["loss"] for row in log_of(tmp_path / name)])
    assert len(logs[0]) == 3
    # Three updates of fp32 with the sums of a block in another order.
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)


def parsed(tmp_path, **values):
    data = tmp_path / "data.json"
    data.write_text("[]")
    common = dict(model_name_or_path=tmp_path, data_path=data, output_dir=tmp_path / "out", use_cpu=True)
    return parse(flags(**{**common, **values}))


@pytest.mark.parametrize(
    "values, said",
    [
        (dict(torch_compile_backend="onnxrt"), "onnxrt is not possible; choose from inductor"),
        (dict(torch_compile_mode="reduce-overhead"), "CUDA graphs want one shape"),
        (dict(torch_compile_mode="default", torch_compile_backend="eager"), "is a mode of inductor"),
        (dict(torch_compile=True, use_liger_kernel=True), "keep one"),
        (dict(torch_compile=True, deepspeed="ds_config.json"), "not possible with ZeRO-3"),
    ],
)
def test_what_cannot_be_compiled_is_refused(tmp_path, values, said):
    with pytest.raises(UserError, match=said):
        parsed(tmp_path, **values)


def test_a_backend_alone_turns_compiling_on_and_transformers_hears_nothing(tmp_path):
    from baichuan_sft.train.sft import training_arguments

    settings = parsed(tmp_path, torch_compile_backend="eager")
    assert settings.training["torch_compile"] is True
    args = training_arguments(settings)
    assert (args.torch_compile, args.torch_compile_backend) == (False, None)


def test_no_compiler_is_said_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # holds no finished kernel
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    with pytest.raises(EnvironmentFault, match=r"inductor cannot compile .*C\+\+ compiler"):
        parsed(tmp_path, torch_compile=True)


# --- Liger ------------------------------------------------------------------------------------------


def test_liger_is_refused_on_the_cpu(tmp_path):
    with pytest.raises(EnvironmentFault, match="need a CUDA GPU"):
        parsed(tmp_path, use_liger_kernel=True)


def test_liger_that_cannot_be_imported_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(EnvironmentFault, match="pip install liger-kernel triton"):
        fused.require_fused(dict(torch_compile=False, use_liger_kernel=True, use_cpu=False))


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ARCHES)
def test_liger_is_equal(arch):
    model, batch = tiny(arch, attn="sdpa").cuda(), packed(*SHAPES[0], device="cuda")
    wanted = loss_and_gradients(model, batch)
    fused.use_liger(model)
    assert_equal(loss_and_gradients(model, batch), wanted, RELATIVE)


# --- LoRA -------------------------------------------------------------------------------------------


def kept_shapes(model, batch):
    """Shapes of what one decoder layer's linears keep for backward, weights apart, by linear."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[str, list[tuple[int, ...]]] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers.1." in name:
            name = name.partition(".layers.1.")[2]

            def before(module, args, name=name):
                def pack(tensor):
                    if tensor.untyped_storage().data_ptr() not in weights:
                        kept.setdefault(name, []).append(tuple(tensor.shape))
                    return tensor

                module.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
                module.hooks.__enter__()

            hooks.append(module.register_forward_pre_hook(before))
            hooks.append(module.register_forward_hook(lambda module, *_: module.hooks.__exit__()))
    model(**batch)
    for hook in hooks:
        hook.remove()
    return kept


def test_frozen_linears_keep_no_input():
    batch = packed(*SHAPES[0])
    full = kept_shapes(tiny("baichuan2-7b"), batch)
    assert {name.rpartition(".")[2] for name in full} == {
        "W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    lora = kept_shapes(tiny("baichuan2-7b", "W_pack"), batch)
    assert {name.partition("W_pack.")[2] for name in lora} == {"lora_A.default", "lora_B.default"}
    assert [shape[-1] for shapes in lora.values() for shape in shapes] == [48, 4]  # x for A, x A' for B
