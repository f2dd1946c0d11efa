"""On a CUDA device: the vendor's numbers, and one training run in bf16. Skipped where there is none."""

import pytest
import torch
from fixtures import MODELS, ROOT, golden, golden_model
from launching import deepspeed, flags, log_of, make_nano

from baichuan_sft.checkpoint import verify

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_golden_logits_loss_and_gradients(name, attn):
    torch.backends.cuda.matmul.allow_tf32 = False
    gold, model = golden(name), golden_model(name, attn).cuda()
    ids, labels = gold["nopad/input_ids"].cuda(), gold["nopad/labels"].cuda()
    with torch.no_grad():
        out = model(ids, labels=labels)
    # the gates of test_golden.py: they leave room for other kernels
    assert (out.logits.cpu() - gold["nopad/eval_logits"]).abs().max() < 1e-4
    assert abs(out.loss.item() - gold["nopad/eval_loss"].item()) < 1e-5
    mask = gold["rightpad/attention_mask"].cuda()
    model.config.z_loss_weight = 0.0
    model.train()(
        gold["rightpad/input_ids"].cuda(), mask, labels=gold["rightpad/labels"].cuda()
    ).loss.backward()
    for key in (key for key in gold.cases if key.startswith("rightpad/grad/")):
        grad = model.get_parameter(key.removeprefix("rightpad/grad/")).grad.cpu()
        assert (grad - gold[key]).abs().max() < 1e-5, key


@pytest.mark.parametrize("lora", [False, True])
def test_zero3_bf16_run(lora, tmp_path):
    nano = make_nano(tmp_path / "nano")
    words = flags(
        model_name_or_path=nano,
        data_path=ROOT / "data" / "belle_chat.json",
        output_dir=tmp_path / "out",
        deepspeed=ROOT / "ds_config.json",
        bf16=True,
        tf32=True,
        use_lora=lora,
        max_steps=20,
        learning_rate=5e-3,
        gradient_checkpointing=True,
    )
    done = deepspeed(ROOT / "fine-tune" / "fine-tune.py", *words, processes=1)
    assert done.returncode == 0, done.stdout[-4000:]
    losses = [row["loss"] for row in log_of(tmp_path / "out")]
    assert losses[-1] < losses[0]
    verify(tmp_path / "out")
