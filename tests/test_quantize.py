"""``baichuan-sft quantize``, loading what it writes, and the vendor's own packings taken apart."""

import io
import json
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from fixtures import ARCHES, GOLDEN, ROOT, SHARED, SMALL_VOCABULARY, cross_entropy, tiny_config
from safetensors.torch import load_file, save_file
from test_checkpoint import run_python

from baichuan_sft.checkpoint import load_config, load_model, load_tokenizer, verify
from baichuan_sft.checkpoint.quantised import check_trainable
from baichuan_sft.commit import problems
from baichuan_sft.errors import CheckpointFault, EnvironmentFault, NumericalFault, UserError
from baichuan_sft.export import convert, quantize
from baichuan_sft.export.vendor_packing import unpack
from baichuan_sft.infer import chat
from baichuan_sft.model.modeling_baichuan import BaichuanForCausalLM
from baichuan_sft.quantization import QUANTIZATIONS, weight_bytes
from baichuan_sft.variants import LINEARS

pytest.importorskip("bitsandbytes")
DATA = ROOT / "data" / "belle_chat.json"
IDS = torch.arange(24)[None] * 50
NUM = 12
WIDE = dict(num_attention_heads=8, hidden_size=128, intermediate_size=192)  # rows of whole NF4 blocks


def save(path, arch="baichuan2-7b", **changes):
    torch.manual_seed(0)
    config = tiny_config(arch, **{**WIDE, **changes})
    BaichuanForCausalLM(config).save_pretrained(path)
    load_tokenizer(SMALL_VOCABULARY).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    return save(tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="module")
def written(nano, tmp_path_factory):
    """name -> directory that the command wrote, without a file to measure on."""
    root = tmp_path_factory.mktemp("written")
    for name in QUANTIZATIONS:
        assert quantize.main([str(nano), str(root / name), "--to", name, "--dtype", "bf16"]) == 0
    return {name: root / name for name in QUANTIZATIONS}


@pytest.fixture
def copy(written, tmp_path):
    return lambda name: shutil.copytree(written[name], tmp_path / name)


def logits_of(model):
    with torch.no_grad():
        return model(IDS).logits


def change_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    settings = {**config["quantization_config"], **changes.pop("quantization", {})}
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": settings} | changes))
    for name in ("manifest.json", "COMMIT"):
        (path / name).unlink(missing_ok=True)


# --- the command ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTIZATIONS)
@pytest.mark.parametrize("arch", ARCHES)
def test_saved_and_loaded_is_what_was_in_memory_bit_for_bit(arch, name, tmp_path):
    base, out = save(tmp_path / "base", arch), tmp_path / "out"
    settings = {"do_sample": False, "temperature": 0.3, "max_new_tokens": 7}  # transformers would not save it
    (base / "generation_config.json").write_text(json.dumps(settings))
    assert quantize.main([str(base), str(out), "--to", name]) == 0
    live, loaded = load_model(base, quantize=name), load_model(out)
    assert torch.equal(logits_of(live), logits_of(loaded))
    assert not torch.equal(logits_of(load_model(base)), logits_of(loaded))
    verify(out)
    assert problems(out) == []
    assert json.loads((out / "manifest.json").read_text())["quantized"] == {"to": name, "from": str(base)}
    assert loaded.generation_config.max_new_tokens == 7
    assert load_tokenizer(out).encode("你好") == load_tokenizer(base).encode("你好")


def cells(text):
    """Rows of the printed tables: name -> the cells after it."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    return {row[0]: row[1:] for row in rows}


def in_fp32(model):
    """The loss of bf16 logits, summed in bf16, would be off by 2**-8."""
    return lambda ids: SimpleNamespace(logits=model(ids).logits.float())


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_the_table_is_what_is_computed_otherwise(nano, name, tmp_path, capsys):
    """Perplexity from whole logits of each conversation alone, bytes from tensors and files."""
    records = json.loads(DATA.read_text(encoding="utf-8"))[:NUM]
    out = tmp_path / "out"
    words = [str(nano), str(out), "--to", name, "--dtype", "bf16", "--file", str(DATA), "--num", str(NUM)]
    assert quantize.main(words) == 0
    text = capsys.readouterr().out
    rows = cells(text.split("published")[0])
    before, after = load_model(nano, dtype=torch.bfloat16), load_model(out)
    for row, model, path in (("before", before, nano), (name, after, out)):
        total, count = cross_entropy(in_fp32(model), records)
        gib, disk, perplexity = map(float, rows[row])
        # The head's product is bf16 here, fp32 in the loss: 2**-9 of logits of up to 3, averaged out.
        assert perplexity == pytest.approx(math.exp(total / count), rel=2e-3), row
        assert gib == pytest.approx(weight_bytes(model) / 2**30, rel=1e-3)
        assert disk == pytest.approx((path / "model.safetensors").stat().st_size / 2**30, rel=1e-3)
    change = float(rows[name][2]) / float(rows["before"][2]) - 1
    assert float(rows["change"][2].rstrip("%")) / 100 == pytest.approx(change, abs=1e-4)
    assert rows["before"][2] != rows[name][2]
    assert f"baichuan-sft chat {out}" in text


def test_targets_count_alike_however_long_their_conversations():
    class Model:
        device = "cpu"

        def model(self, input_ids, use_cache):
            return type("Output", (), {"last_hidden_state": input_ids})

        def lm_head(self, hidden, labels, divisor):
            assert divisor == 1
            return (labels[:, 1:] == 7).sum() * 3.0 + (labels[:, 1:] == 8).sum() * 1.0

    segments = [([1, 7, 7, 7], [7, 7, 7, 7]), ([1, 8], [-100, 8]), ([1, 2], [-100, -100])]
    assert quantize.perplexity(Model(), segments, "x") == pytest.approx(math.exp((3 * 3 + 1) / 4))
    Model.lm_head = lambda *_: torch.tensor(float("nan"))
    with pytest.raises(NumericalFault, match="x: its loss is nan; try --dtype bf16"):
        quantize.perplexity(Model(), segments, "x")


def test_text_is_measured_too(nano, tmp_path, capsys):
    (tmp_path / "book.txt").write_text("春眠不觉晓，处处闻啼鸟。\n" * 20, encoding="utf-8")
    words = ["--file", str(tmp_path / "book.txt"), "--data_format", "document"]
    assert quantize.main([str(nano), str(tmp_path / "out"), "--to", "nf4", *words]) == 0
    rows = cells(capsys.readouterr().out.split("published")[0])
    assert 1000 < float(rows["before"][2]) < 20000  # random weights: about the vocabulary's 6,144


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_the_vendors_scores_are_of_the_same_architecture_or_none(arch, name):
    from rich.console import Console

    console = Console(file=io.StringIO(), width=100)
    console.print(quantize.published(arch, name))
    text = console.file.getvalue()
    known = quantize.PUBLISHED.get(arch)
    if known is None or name not in known.quantised:
        assert text.strip() == f"The vendor published no scores of {name} for {arch}."
        return
    assert known.model.lower().startswith(arch) and known.model in text and known.source in text
    how, scores = known.quantised[name]
    rows = {
        row: [float(cell) for cell in found] for row, found in cells(text).items() if row != "five-shot, %"
    }
    assert rows.pop("change") == pytest.approx([b - a for a, b in zip(known.whole, scores)], abs=0.006)
    assert rows == {known.model: list(known.whole), how: list(scores)}
    assert all(a > b for a, b in zip(known.whole, scores, strict=True))  # the README's drop


# --- what is refused --------------------------------------------------------------------------------


def test_what_cannot_be_quantised_is_refused(nano, written, tmp_path, monkeypatch):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(nano)}))
    out = tmp_path / "out"
    cases = [
        (str(adapter), [], r"an adapter, not a whole model; merge it first: baichuan-sft merge .*adapter"),
        (str(written["nf4"]), [], r"is quantised already \(nf4\), a second time would round twice"),
        (str(nano), ["--num", "3"], "--num is given without --file, and would do nothing"),
        (str(nano), ["--to", "int4"], "invalid choice: 'int4'"),
        (str(nano), ["--file", str(tmp_path / "none.json")], "none.json"),
    ]
    for source, words, message in cases:
        with pytest.raises(UserError, match=message):
            quantize.main([source, str(out), "--to", "int8", *words])
    with pytest.raises(UserError, match="is not an empty directory"):
        quantize.main([str(nano), str(written["nf4"]), "--to", "int8"])
    monkeypatch.setattr("baichuan_sft.quantization.importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match="--to int8 needs bitsandbytes: pip install"):
        quantize.main([str(nano), str(out), "--to", "int8"])
    with pytest.raises(EnvironmentFault, match="which is nf4, needs bitsandbytes"):
        load_model(written["nf4"])
    assert not out.exists()


def test_other_logits_after_loading_leave_nothing(nano, tmp_path, monkeypatch):
    answers = iter([torch.zeros(1), torch.ones(1)])
    monkeypatch.setattr(quantize, "probe", lambda model: next(answers))
    with pytest.raises(CheckpointFault, match="gives other logits than what was written, and was removed"):
        quantize.main([str(nano), str(tmp_path / "out"), "--to", "nf4"])
    assert not (tmp_path / "out").exists()


def test_logits_that_are_no_numbers_are_not_written(nano, tmp_path):
    path = shutil.copytree(nano, tmp_path / "large")
    tensors = load_file(path / "model.safetensors")
    for layer in range(2):
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"] *= 1e6  # finite in fp16, its products are not
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalFault, match="large: its logits are not finite; try --dtype bf16, or fp32"):
        quantize.main([str(path), str(tmp_path / "out"), "--to", "nf4", "--dtype", "fp16"])
    assert not (tmp_path / "out").exists()


def test_what_the_first_forward_changes_is_not_what_is_written(nano, tmp_path, monkeypatch):
    """bitsandbytes repacks NF4 on some CPUs, and packs the scales again when they are saved, rounded."""
    probe = quantize.probe

    def probe_and_repack(model):
        logits = probe(model)
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.data = torch.zeros_like(layer.mlp.up_proj.weight.data)
            layer.mlp.up_proj.weight.quant_state.absmax = torch.zeros(1)
        return logits

    monkeypatch.setattr(quantize, "probe", probe_and_repack)
    assert quantize.main([str(nano), str(tmp_path / "out"), "--to", "nf4"]) == 0
    live = load_model(nano, quantize="nf4")
    assert torch.equal(logits_of(live), logits_of(load_model(tmp_path / "out")))


def test_a_forward_leaves_four_bits_as_they_are_on_every_cpu(nano, monkeypatch):
    """On one with AVX512-BF16, which this one is taken for, bitsandbytes would rewrite them, rounded."""
    import bitsandbytes.nn.modules as modules

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    options = dict(load_in_4bit=True, dtype=torch.float32)
    for model in (
        load_model(nano, quantize="nf4"),
        load_model(nano).quantize(4),
        BaichuanForCausalLM.from_pretrained(nano, **options),
        BaichuanForCausalLM.from_pretrained(nano, output_loading_info=True, **options)[0],
    ):
        weight = model.model.layers[1].mlp.down_proj.weight
        before, scales = weight.data.clone(), weight.quant_state.absmax.clone()
        logits_of(model.eval())
        assert torch.equal(weight.data, before) and torch.equal(weight.quant_state.absmax, scales)
        assert weight.quant_state.nested


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path):
    """With AVX-512 bitsandbytes takes the scales of other weights, and says nothing."""
    base = save(tmp_path / "base", hidden_size=96)
    message = "rows of 96, no multiple of 64"
    with pytest.raises(UserError, match=message):
        load_model(base, quantize="nf4")
    with pytest.raises(UserError, match=message):
        quantize.main([str(base), str(tmp_path / "out"), "--to", "nf4"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="W_pack: rows of 96 are no multiple of 64"):
        load_model(base).quantize(4)
    with pytest.raises(ValueError, match="W_pack: rows of 96 are no multiple of 64"):
        BaichuanForCausalLM.from_pretrained(base, load_in_4bit=True)
    assert load_model(base, quantize="int8") and load_model(base).quantize(8)


@pytest.mark.parametrize("name", ["meta", "quantum", "cuda:99"])
def test_a_device_that_is_not_there_is_what_is_blamed(nano, tmp_path, name):
    with pytest.raises(EnvironmentFault, match=f"--device {name}: ") as caught:
        quantize.main([str(nano), str(tmp_path / "out"), "--to", "nf4", "--device", name])
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    with pytest.raises(EnvironmentFault, match=f"--device {name}: "):
        chat.load(chat.build_parser().parse_args([str(nano), "--device", name]))


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_a_quantised_directory_takes_no_other_bits(written, name):
    other = next(kind for kind in QUANTIZATIONS if kind != name)
    with pytest.raises(UserError, match=rf"is quantised already \({name}\); --quantize {other} would round"):
        load_model(written[name], quantize=other)
    assert torch.equal(
        logits_of(load_model(written[name], quantize=name)), logits_of(load_model(written[name]))
    )
    config = load_config(written[name])
    check_trainable(written[name], config, name)
    for wrong in (None, other):
        with pytest.raises(
            UserError, match=rf"only adapters on it can be trained: --use_lora True .* {name};"
        ):
            check_trainable(written[name], config, wrong)


# --- loading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_what_transformers_wrote_loads_too(nano, name, tmp_path):
    live = load_model(nano, quantize=name)
    live.save_pretrained(tmp_path)
    load_tokenizer(nano).save_pretrained(tmp_path)
    verify(tmp_path)
    assert torch.equal(logits_of(load_model(tmp_path)), logits_of(load_model(nano, quantize=name)))


def test_nf4_without_double_quantisation_and_fp4_load(nano, tmp_path):
    from transformers import BitsAndBytesConfig

    for kind, double in (("nf4", False), ("fp4", True)):
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double
        )
        options = dict(quantization_config=settings, device_map={"": "cpu"})
        live = BaichuanForCausalLM.from_pretrained(nano, **options).eval()
        live.save_pretrained(tmp_path / kind)
        verify(tmp_path / kind)
        assert torch.equal(logits_of(load_model(tmp_path / kind)), logits_of(live))


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_the_dtype_asked_for_is_the_dtype(written, name):
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(written[name], dtype=dtype)
        assert {model.dtype, model.lm_head.weight.dtype, logits_of(model).dtype} == {dtype}
        linear = model.model.layers[0].mlp.up_proj
        assert name == "int8" or linear.compute_dtype == dtype


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_chat_works_on_it(written, name, monkeypatch):
    words = [str(written[name]), "--device", "cpu"]
    model, tokenizer = chat.load(chat.build_parser().parse_args(words))
    assert f"linear layers in {name}" in chat.describe(model)
    monkeypatch.setattr(chat, "_check_compile", lambda *_: None)  # which refuses a CPU first
    with pytest.raises(UserError, match=f"is {name}, which transformers does not compile"):
        chat.load(chat.build_parser().parse_args([*words, "--compile"]))
    options = dict(do_sample=False, max_new_tokens=6)
    assert model.chat(tokenizer, [{"role": "user", "content": "你好"}], **options)


def drop(suffix):
    def damage(tensors):
        del tensors[next(name for name in tensors if name.endswith(suffix))]

    return damage


def shorten(suffix):
    def damage(tensors):
        name = next(name for name in tensors if name.endswith(suffix))
        tensors[name] = tensors[name][:-1].clone()

    return damage


DAMAGES = [
    ("int8", drop(".SCB"), r"1 tensors missing, e.g. model.layers.0.\S+.SCB"),
    ("int8", shorten("W_pack.weight"), r"W_pack.weight \(383, 128\), expected \(384, 128\)"),
    ("int8", shorten("o_proj.SCB"), r"o_proj.SCB \(127,\), expected \(128,\)"),
    ("nf4", drop(".absmax"), r"1 tensors missing, e.g. model.layers.0.\S+.weight.absmax"),
    ("nf4", shorten("W_pack.weight"), r"W_pack.weight \(24575, 1\), expected \(24576, 1\)"),
    ("nf4", shorten("W_pack.weight.absmax"), r"W_pack.weight.absmax \(767,\), expected \(768,\)"),
    ("nf4", shorten("W_pack.weight.nested_absmax"), r"nested_absmax \(2,\), expected \(3,\)"),
    ("nf4", drop("o_proj.weight.quant_state.bitsandbytes__nf4"), r"missing, e.g. \S+bitsandbytes__nf4"),
]


@pytest.mark.parametrize("name, damage, message", DAMAGES, ids=[message[:40] for *_, message in DAMAGES])
def test_a_damaged_packed_tensor_is_named(copy, name, damage, message):
    path = copy(name)
    tensors = load_file(path / "model.safetensors")
    damage(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    change_config(path)
    for load in (verify, load_model):
        with pytest.raises(CheckpointFault, match=message):
            load(path)


def test_the_manifest_sees_what_shapes_do_not(copy):
    path = copy("nf4")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0] ^= 1
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointFault, match=r"model\.safetensors: checksum differs"):
        load_model(path)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(quant_method="gptq"), "quantised by 'gptq', which nothing here reads"),
        (dict(load_in_8bit=False), "quantised by 'bitsandbytes', which nothing here reads"),
        (dict(load_in_4bit=True), "load_in_4bit and load_in_8bit are both True"),
        (dict(llm_int8_skip_modules="o_proj"), "llm_int8_skip_modules must be a list of strings"),
    ],
)
def test_settings_that_say_something_else(copy, change, message):
    path = copy("int8")
    change_config(path, quantization=change)
    with pytest.raises(UserError, match=message) as caught:
        load_config(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_layers_that_were_left_whole_are_expected_whole(copy):
    path = copy("int8")
    change_config(path, quantization={"llm_int8_skip_modules": ["lm_head", "o_proj"]})
    with pytest.raises(CheckpointFault, match=r"do not belong, e.g. model.layers.0.self_attn.o_proj.SCB"):
        load_model(path)


ELSEWHERE = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for path, logits in torch.load(sys.argv[1]).items():
    model = AutoModelForCausalLM.from_pretrained(path, device_map="auto", trust_remote_code=True).eval()
    with torch.no_grad():
        found = model(input_ids=torch.arange(24)[None] * 50).logits
    assert torch.equal(found, logits), (path, (found - logits).abs().max())
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    assert model.chat(tokenizer, [{"role": "user", "content": "你好"}], max_new_tokens=4, do_sample=False)
assert any("baichuan_sft." in name for name in sys.modules) == (len(sys.argv) > 2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("package", [True, False], ids=["with the package", "without"])
def test_it_is_self_contained(written, package, tmp_path):
    """The vendor's README: a directory of 8 or 4 bits, ``device_map="auto"``."""
    torch.save(
        {str(path): logits_of(load_model(path)) for path in written.values()}, tmp_path / "expected.pt"
    )
    start = "import sys\nimport baichuan_sft.model.modeling_baichuan\n"
    if not package:
        start = "import sys\nsys.modules.update(dict.fromkeys(['baichuan_sft', 'deepspeed', 'datasets']))\n"
    words = [tmp_path / "expected.pt", *(["package"] if package else [])]
    run_python(start + ELSEWHERE, tmp_path, *words, package=package)


# --- the vendor's own packings ----------------------------------------------------------------------


def golden(name):
    path = next(
        (root / "misc" / name for root in (GOLDEN, SHARED / "golden") if (root / "misc" / name).exists()),
        None,
    )
    if path is None:
        pytest.skip(f"needs the golden numbers {name}")
    return load_file(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_int8_gives_the_vendors_products(dtype):
    """Baichuan-13B's QLinear, run: the same packed numbers give the same products, bit for bit."""
    numbers, name = golden("baichuan1_quant.safetensors"), str(dtype).removeprefix("torch.")
    packed, scale = numbers[f"int8_weight_T_{name}"], numbers[f"int8_scale_{name}"]
    weight = unpack("x.weight", {"x.weight": packed, "x.scale": scale})
    assert torch.equal(numbers["x"].to(dtype) @ weight.to(dtype).T, numbers[f"int8_out_{name}"])
    assert torch.equal((weight / scale[:, None]).round().to(torch.int8).T, packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_int4_is_within_half_a_step_of_what_was_packed(dtype):
    numbers, name = golden("baichuan1_quant.safetensors"), str(dtype).removeprefix("torch.")
    packed, scale = numbers[f"int4_packed_{name}"], numbers[f"int4_scale_{name}"]
    weight = unpack("x.weight", {"x.weight": packed, "x.scale": scale})
    # Half a step; and in half precision the weight and the quotient, up to 7, are rounded before.
    slack = 1e-6 if dtype == torch.float32 else 2 * 7 * torch.finfo(dtype).eps
    assert ((weight - numbers["weight"]).abs() / scale[:, None]).max() < 0.5 + slack
    steps = (weight / scale[:, None]).round().int()
    assert steps.min() == -7 and steps.max() == 7
    again = sum((steps.view(24, 8, 8)[:, :, n] & 0xF) << (4 * n) for n in range(8))
    assert torch.equal(again.int(), packed)


def nibbles(*values):
    return torch.tensor([sum((v & 0xF) << (4 * n) for n, v in enumerate(values))]).to(torch.int32)[None]


def test_nibbles_by_hand():
    channels = [1, -1, 7, -8, 0, 3, -4, -2]  # the last one's sign is the word's
    weight = unpack("x.weight", {"x.weight": nibbles(*channels), "x.scale": torch.tensor([0.5])})
    assert weight.tolist() == [[c / 2 for c in channels]]


def old_state(packed, shape, absmax, offset, nested, code):
    """bitsandbytes' list of 2023, as Baichuan2's 4-bit files hold it."""
    second = [*nested, 256, False, torch.float32, None, None]
    return [absmax, shape, torch.float16, 64, [offset, second], "nf4", code]


@pytest.mark.parametrize("size", ["small", "large"])
def test_nf4_gives_the_recorded_weights(size, tmp_path):
    numbers = {k.split("/")[1]: v for k, v in golden("nf4_bitsandbytes.safetensors").items() if size in k}
    nested = (numbers["state2_absmax"], numbers["state2_code"])
    shape = numbers["weight"].shape
    state = old_state(
        numbers["packed"], shape, numbers["absmax_q"], numbers["offset"], nested, numbers["code"]
    )
    weight = unpack("x.weight", {"x.weight.data": numbers["packed"], "x.weight.quant_state": state})
    assert torch.equal(weight, numbers["dequant"].float())
    plain = [numbers["nodq_absmax"], shape, torch.float16, 64, None, "nf4", numbers["code"]]
    weight = unpack("x.weight", {"x.weight.data": numbers["nodq_packed"], "x.weight.quant_state": plain})
    assert torch.equal(weight, numbers["nodq_dequant"].float())


def pack(weight, kind):
    """The entries of a vendor's file for one fp16 weight, as its quantizer.py makes them."""
    if kind == "nf4":
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        nested = (state.state2.absmax, state.state2.code)
        return {
            ".weight.data": packed,
            ".weight.quant_state": old_state(
                packed, state.shape, state.absmax, state.offset, nested, state.code
            ),
        }
    scale = weight.abs().amax(1) / (127 if kind == "int8" else 7)
    steps = (weight / scale[:, None]).round().int()
    if kind == "int8":
        return {".weight": steps.to(torch.int8).T.contiguous(), ".scale": scale.float()}
    steps = steps.clip(-16, 15).view(len(weight), -1, 8) & 0xF
    return {".weight": sum(steps[:, :, n] << (4 * n) for n in range(8)).int(), ".scale": scale.float()}


def vendor_packed(base, path, kind, **settings):
    """A vendor's quantised checkpoint: fp16, pytorch_model.bin, and what its config.json says of it."""
    shutil.copytree(base, path)
    (path / "model.safetensors").unlink()
    entries = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        is_linear = module.rpartition(".")[2] in LINEARS
        parts = pack(tensor.half(), kind) if is_linear else {".weight": tensor.half()}
        entries |= {module + suffix: part for suffix, part in parts.items()}
    torch.save(entries, path / "pytorch_model.bin")
    config = json.loads((path / "config.json").read_text())
    config |= {"dtype": "float16"} | ({"quantization_config": settings} if settings else {})
    (path / "config.json").write_text(json.dumps(config))
    return path


# Of the largest in its row (NF4: its block), half the widest step, and fp16's roundings.
STEP = {"int8": 0.5 / 127 + 2**-9, "int4": 0.5 / 7 + 2**-9, "nf4": 0.16}


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("arch", ["baichuan-13b", "baichuan2-7b"])
def test_a_vendors_quantised_checkpoint_is_unpacked(arch, kind, tmp_path, capsys):
    base = save(tmp_path / "base", arch)
    settings = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4") if kind == "nf4" else {}
    packed = vendor_packed(base, tmp_path / "packed", kind, **settings)
    out = tmp_path / "out"
    for load in (load_model, lambda path: convert.main([str(path), str(out)])):
        with pytest.raises(UserError, match=r"vendor's own code.*baichuan-sft convert \S+ \S+ --dequantize"):
            load(packed)
    assert convert.main([str(packed), str(out), "--dequantize"]) == 0
    said = capsys.readouterr().out
    assert "10 quantised weights are unpacked: what was rounded stays rounded" in said
    assert "nothing is lost" not in said
    whole, unpacked = load_file(base / "model.safetensors"), load_model(out)
    assert unpacked.dtype == torch.float16
    compared = 0
    for name, tensor in unpacked.state_dict().items():
        if name.split(".")[-2] in LINEARS:
            compared += 1
            width = 64 if kind == "nf4" else tensor.shape[1]
            after, before = tensor.float().reshape(-1, width), whole[name].reshape(-1, width)
            error = (after - before).abs().amax(1) / before.abs().amax(1)
            assert 0 < error.max() < STEP[kind], name
        else:
            assert torch.equal(tensor, whole[name].half()), name
    assert compared == 2 * len(LINEARS)


def test_a_vendors_checkpoint_with_todays_marker_is_named_by_its_weights(nano, tmp_path):
    packed = vendor_packed(nano, tmp_path / "packed", "nf4", load_in_4bit=True, quant_method="bitsandbytes")
    with pytest.raises(UserError, match="the vendor's own code quantised"):
        load_model(packed)
    assert convert.main([str(packed), str(tmp_path / "out"), "--dequantize"]) == 0


def test_dequantize_has_something_to_do(nano, written, tmp_path):
    for source, message in (
        (nano, "nothing in it is packed as the vendor's code does"),
        (written["nf4"], "absmax"),
    ):
        with pytest.raises(UserError, match=message):
            convert.main([str(source), str(tmp_path / "out"), "--dequantize"])


FOREIGN = [
    ({"x.weight": torch.zeros(4, 4), "x.scale": torch.zeros(4)}, "in a way that is not the vendor's"),
    (
        {"x.weight": torch.zeros(8, 4, dtype=torch.int8), "x.scale": torch.zeros(3)},
        "in a way that is not the vendor's",
    ),
    ({"x.weight.data": torch.zeros(4), "x.weight.quant_state": [1]}, "its quant_state is not bitsandbytes'"),
]


@pytest.mark.parametrize("tensors, message", FOREIGN)
def test_other_packings_are_refused_by_name(tensors, message):
    with pytest.raises(CheckpointFault, match=re.escape(message)):
        unpack("x.weight", tensors)


def nf4_entries(**changes):
    """A packed weight of 512 by 128, 1024 blocks; entries of its state changed by function."""
    torch.manual_seed(0)
    entries = pack(torch.randn(512, 128).half(), "nf4")
    state = dict(
        zip(("absmax", "shape", "dtype", "block", "nested", "kind", "code"), entries[".weight.quant_state"])
    )
    entries[".weight.quant_state"] = [changes.get(key, lambda x: x)(part) for key, part in state.items()]
    entries[".weight.data"] = changes.get("packed", lambda x: x)(entries[".weight.data"])
    return {f"x{suffix}": part for suffix, part in entries.items()}


def cut(tensor):
    return tensor[:-1].clone()


def nested(position, change):
    return lambda part: [part[0], [change(x) if i == position else x for i, x in enumerate(part[1])]]


CUT = [
    (dict(absmax=cut), "1023 scales, expected 1024"),
    (dict(code=cut), "15 codes, expected 16"),
    (dict(packed=cut), "32767 weights, expected 32768"),
    (dict(nested=nested(0, cut)), "3 scales of scales, expected 4"),
    (dict(nested=nested(1, cut)), "255 codes of scales, expected 256"),
    (dict(nested=nested(2, lambda size: 0)), "division by zero"),
    (dict(shape=lambda shape: torch.Size([4096, 4096])), "weights, expected 8388608"),
    (dict(shape=lambda shape: torch.Size([2048, 32])), "rows of 32 are no multiple of its blocks of 64"),
    (dict(block=lambda block: 0), "division by zero"),
    (dict(kind=lambda kind: "fp4"), "of type 'fp4', expected 'nf4'"),
]


@pytest.mark.parametrize("changes, message", CUT, ids=[message for _, message in CUT])
def test_a_cut_nf4_packing_is_refused(changes, message):
    """bitsandbytes' kernels read past the end of what is too short and return what they find there."""
    assert unpack("x.weight", nf4_entries()).shape == (512, 128)
    with pytest.raises(CheckpointFault, match=rf"x.weight: .*{re.escape(message)}.*; take the 16-bit model"):
        unpack("x.weight", nf4_entries(**changes))
