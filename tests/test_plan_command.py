"""`baichuan-sft plan`: what it picks, what it writes, and its arithmetic against other people's."""

import json
import random
import statistics
import subprocess
import sys

import pytest
from fixtures import ROOT, SMALL_VOCABULARY
from launching import make_nano

sys.path.insert(0, str(ROOT))

from baichuan_sft.errors import UserError
from baichuan_sft.plan import choose, simulate
from baichuan_sft.plan.command import build_parser, count_tokens, job_of, main
from baichuan_sft.plan.communication import Load, Network, traffic
from baichuan_sft.variants import VARIANTS
from benchmarks import scale


def job(words):
    return job_of(build_parser().parse_args(words.split()))


def planned(capsys, words):
    code = main([*words.split(), "--json"])
    return code, json.loads(capsys.readouterr().out)


# --- what is picked ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, method, recipe",
    [
        # one NVLink host: all of 7B fits, and ZeRO-3's traffic is hidden
        ("--model baichuan2-7b --gpus 8x80", "full", "zero3"),
        # hosts on 100 Gb Ethernet: weights cross once, and once reduced
        ("--model baichuan2-13b --gpus 8x80 --hosts 4 --bandwidth_inter 11", "full", "hpz"),
        # 16 bytes per parameter do not fit into one GPU
        ("--model baichuan2-7b --gpus 1x80", "lora", "ddp"),
        ("--model baichuan2-13b --gpus 1x24", "qlora", "ddp"),
        ("--model baichuan2-13b --gpus 8x24 --method full --host_memory 500", "full", "offload"),
    ],
)
def test_picks(capsys, words, method, recipe):
    code, said = planned(capsys, words)
    assert code == 0
    assert (said["plan"]["picked"]["method"], said["plan"]["picked"]["recipe"]) == (method, recipe)
    picked = said["plan"]["picked"]
    assert picked["lacks"] == "" and picked in said["ways"]
    rivals = [way for way in said["ways"] if way["method"] == method and not way["lacks"]]
    if recipe != "offload":
        assert picked["update"]["seconds"] <= 1.03 * min(way["update"]["seconds"] for way in rivals)


@pytest.mark.parametrize("limit, word", [("--host_memory 100", "host"), ("--disk 100", "disk")])
def test_what_is_too_small_is_named(capsys, limit, word):
    _, said = planned(capsys, f"--model baichuan2-7b --gpus 8x80 {limit}")
    assert {way["lacks"].split()[0] for way in said["ways"] if way["method"] == "full"} >= {word}


def test_nothing_fits(capsys):
    assert main("--model baichuan2-13b --gpus 1x24 --method full --host_memory 64".split()) == 3
    assert "Nothing fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        ("--model baichuan2-13 --gpus 8x80", "did you mean 'baichuan2-13b'"),
        ("--model baichuan2-7b --gpus 8", "expected 8x80"),
        ("--model baichuan2-7b --gpus 0x80", "expected 8x80"),
        ("--model baichuan2-7b --gpus 8x79", "no device of 79 GB"),
        ("--model baichuan2-7b --gpus 8xH1000", "did you mean 'H100'"),
        ("--model baichuan2-7b --gpus 8x80 --tokens 1e9 --data_path x", "keep one"),
        ("--model baichuan2-7b --gpus 8x80 --tokens nan", "not a number above 0"),
        ("--model baichuan2-7b --gpus 8x80 --epochs 2", "needs --tokens"),
        ("--model baichuan2-7b --gpus 8x80 --scale --hosts 2", "--hosts says nothing"),
        ("--model baichuan2-7b --gpus 8x80 --data_path /nowhere.json", "nowhere.json"),
        ("--model baichuan2-7b --gpus 8x80 --write /nowhere/ds.json", "No such file"),
    ],
)
def test_refusals(words, message):
    with pytest.raises(UserError, match=message) as refused:
        main(words.split())
    assert "\n" not in str(refused.value)


def test_a_directory_is_its_config(tmp_path):
    config = dict(VARIANTS["baichuan2-7b"].config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert job(f"--model {tmp_path} --gpus 8x80").config == job("--model baichuan2-7b --gpus 8x80").config
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    with pytest.raises(UserError, match="hidden_size must be"):
        job(f"--model {tmp_path} --gpus 8x80")


def test_tokens_of_a_file_by_its_tokenizer(tmp_path):
    """Exact for a file shorter than the sample: each record's own text in the tokenizer's pieces."""
    from sentencepiece import SentencePieceProcessor

    (tmp_path / "tokenizer.model").write_bytes(SMALL_VOCABULARY.read_bytes())
    data = ROOT / "data" / "belle_chat.json"
    encode = SentencePieceProcessor(model_file=str(SMALL_VOCABULARY)).encode
    records = json.loads(data.read_text())
    texts = ["".join(record_text(record)) for record in records]
    assert count_tokens(str(data), str(tmp_path)) == pytest.approx(sum(len(encode(text)) for text in texts))
    assert count_tokens(str(data), "baichuan2-7b") == pytest.approx(0.6 * sum(map(len, texts)))


def record_text(value):
    if isinstance(value, str):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from record_text(part)


@pytest.mark.parametrize("recipe", [name for name in choose.STAGES if name != "ddp"])
def test_recipes_are_what_is_planned(recipe):
    zero = json.loads((choose.RECIPES / f"{recipe}.json").read_text())["zero_optimization"]
    assert zero["stage"] == choose.STAGES[recipe]
    assert ("offload_optimizer" in zero, "offload_param" in zero) == 2 * (recipe == "offload",)
    assert ("zero_hpz_partition_size" in zero) == (recipe == "hpz")
    # what traffic() supposes: hidden but for zero1, and parts sent to their owners only
    assert zero.get("overlap_comm", False) == (recipe != "zero1")
    assert zero.get("use_multi_rank_bucket_allreduce") == (False if zero["stage"] < 3 else None)


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    return make_nano(tmp_path_factory.mktemp("plan") / "nano")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_training_takes_the_command_and_the_file(nano, tmp_path, capsys, method):
    """The words after ``train`` go through training's own parser, with a model that is really there."""
    from baichuan_sft.train.args import LORA_PRESETS, LoraArguments
    from baichuan_sft.train.parse import parse

    written, data = tmp_path / "ds.json", ROOT / "data" / "belle_chat.json"
    words = f"--model {nano} --gpus 8x80 --hosts 4 --method {method} --write {written} --data_path {data}"
    command = planned(capsys, words)[1]["plan"]["command"]
    assert command[:5] == ["baichuan-sft", "launch", "--hostfile", "hostfile", "train"]
    flags = command[5:]
    flags[flags.index("--output_dir") + 1] = str(tmp_path / "out")
    settings = parse(flags)
    assert settings.training["deepspeed"] == str(written)
    assert settings.lora.use_lora == (method != "full")
    zero = json.loads(written.read_text())["zero_optimization"]
    assert zero["reduce_bucket_size"] == sum(
        inputs * outputs for inputs, outputs in [(128, 384), (128, 128), (128, 384), (128, 384), (384, 128)]
    )
    lora = LoraArguments()
    assert (lora.lora_target,) == simulate.LORA_TARGETS
    assert LORA_PRESETS["default"][::2] == (simulate.LORA_RANK, simulate.LORA_DROPOUT)


def test_no_torch_and_a_table_that_lines_up():
    code = (
        "import sys\nfrom baichuan_sft.plan.command import main\n"
        "code = main('--model baichuan2-13b --gpus 8x80 --hosts 4 --tokens 1e9'.split())\n"
        "sys.exit(9 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    ways = [line for line in lines if line.lstrip(" *").startswith(choose.METHODS)][:15]
    assert len(ways) == 15 and len({len(line) for line in ways}) == 1 and len(ways[0]) <= 118


# --- the arithmetic ---------------------------------------------------------------------------------

NET = Network(gpus=8, hosts=4, intra=100e9, inter=10e9)


@pytest.mark.parametrize(
    "recipe, sent",
    # 31/32 of payloads, by benchmarks/comm.py's formulas: G = T = 2 GB, A = 3 GB, k = 2
    [("ddp", 4), ("zero1", 4), ("zero2", 6), ("zero3", 2 * (2 * 3 + 2))],
)
def test_bytes_are_those_that_are_counted(recipe, sent):
    found = traffic(recipe, Load(2e9, 2e9, 3e9, 1), NET, 2, 0.0, 0.0)
    assert found.sent == found.crossing == pytest.approx(sent * 1e9 * 31 / 32)
    assert found.exposed == found.seconds  # nothing is computed that could hide it


def test_hpz_gathers_across_hosts_once():
    found = traffic("hpz", Load(2e9, 2e9, 3e9, 1), NET, 2, 0.0, 0.0)
    assert found.crossing == pytest.approx((3 + 2 * 2) * 1e9 * 31 / 32)
    assert found.sent - found.crossing == pytest.approx(3 * 3e9 * 7 / 8)


def test_computing_hides_all_but_the_first_message():
    found = traffic("zero3", Load(2e9, 2e9, 3e9, 10), NET, 4, 1e9, 1e9)
    assert found.exposed == pytest.approx(found.seconds / 10)


def test_a_ring_costs_its_slower_link():
    """2.9 GB at 10 GB/s out of a host; 28 steps inside and 3 between, 0.13 ms."""
    assert NET.seconds(3e9) == pytest.approx(3e9 * 31 / 32 / 10e9 + 8.4e-6 + 28 * 3.4e-6 + 3 * 9.6e-6)
    assert NET.within_host().seconds(3e9) == pytest.approx(3e9 * 7 / 8 / 100e9, rel=0.01)
    assert Network(1, 1).seconds(3e9) == 0


@pytest.mark.parametrize("ranks", [8, 64, 1024])
def test_the_slowest_rank_by_monte_carlo(ranks):
    """The mean of the largest of n draws; 400 trials put it within 4 standard errors, 0.2 %."""
    draw = random.Random(0)
    largest = statistics.fmean(max(draw.gauss(1, simulate.SPREAD) for _ in range(ranks)) for _ in range(400))
    of_eight = 1 + simulate.SPREAD * 1.4236  # tabulated: Teichroew 1956
    assert simulate.slowest(ranks) == pytest.approx(largest / of_eight, rel=0.002)


def test_goodput_by_monte_carlo():
    """Failures drawn one by one, 40,000 intervals: two decimals, and the interval is the best one."""
    draw, mtbf, save, restart = random.Random(0), 20000.0, 60.0, 300.0

    def useful(interval):
        time = done = 0.0
        until = draw.expovariate(1 / mtbf)
        for _ in range(40000):
            while until < interval + save:
                time += until + restart
                until = draw.expovariate(1 / mtbf)
            until -= interval + save
            time, done = time + interval + save, done + interval
        return done / time

    found = simulate.goodput(hosts=1, mtbf_hours=mtbf / 3600, save=save, restart=restart)
    assert found.interval == pytest.approx((2 * save * mtbf) ** 0.5)
    assert found.useful == pytest.approx(useful(found.interval), abs=0.01)
    assert found.useful > useful(found.interval / 3) and found.useful > useful(3 * found.interval)


def test_published_runs():
    """llm-foundry's tables, 8 x H100 and 8 x 400 Gb/s per host, FSDP; MPT's shapes (an MLP of two matrices).

    Within a fifth: one efficiency stands for all sizes, where the tables have 40 to 56 % themselves.
    """
    found = {run: scale.simulated(run) / run.tokens_per_second for run in scale.RUNS}
    assert len(found) >= 8
    assert all(0.8 < ratio < 1.2 for ratio in found.values()), found


def test_scale(capsys):
    """A fixed batch ends where no row is left for a GPU; rings over 4,096 ranks cost zero3 more than hpz."""
    assert main("--model baichuan2-7b --gpus 8xH100 --scale --json".split()) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 7 * 2 * 6
    fixed = {row["gpus"]: row["fits"] for row in rows if row["batch"] == "fixed" and row["recipe"] == "zero3"}
    assert fixed == {n: n <= 4194304 // 4096 for n in fixed}
    weak = {
        (row["gpus"], row["recipe"]): row
        for row in rows
        if row["batch"] == "weak" and row["method"] == "full"
    }
    for gpus in fixed:
        assert not weak[gpus, "ddp"]["fits"]
        assert any(row["wins"] for row in rows if row["gpus"] == gpus and row["batch"] == "weak")
    assert weak[4096, "hpz"]["tokens_per_second"] > 1.1 * weak[4096, "zero3"]["tokens_per_second"]
    useful = [weak[gpus, "zero3"]["useful"] for gpus in fixed]
    assert useful == sorted(useful, reverse=True)


def test_a_quantised_base_is_as_large_as_counted():
    """benchmarks/RESULTS.md: 5.03 and 8.46 GiB of weights in NF4."""
    for name, size in (("baichuan2-7b", 5.03), ("baichuan2-13b", 8.46)):
        asked = job(f"--model {name} --gpus 1x24")
        step = choose.step_of(asked, "qlora", "ddp", 4096)
        assert (step.weight_bytes - 4 * step.num_trained) / 2**30 == pytest.approx(size, abs=0.01)
