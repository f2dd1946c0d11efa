"""Whether a resumed run is the run that saved the checkpoint: what may differ, and what may not."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from baichuan_sft.errors import UserError, suggest
from baichuan_sft.train.progress import say

# What decides which rows there are, and in which order they come.
ROWS = """data_format encoding model_max_length truncation train_on on_error dedup merge_consecutive dev_ratio
    packing packing_tokens streaming seed data_seed train_sampling_strategy""".split()
# What may change where --allow_change names it, and takes effect then.
ALLOWED = """learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps num_train_epochs max_steps
    max_grad_norm neftune_noise_alpha lora_dropout attn tf32 torch_compile torch_compile_backend
    torch_compile_mode use_liger_kernel""".split()
# What the trained weights do not depend on, as shell patterns; every other flag is compared. The rows of an
# update, the model, the data and the DeepSpeed file are compared by content.
FREE = """output_dir model_name_or_path deepspeed resume* allow_change overwrite_output_dir checkpointing
    per_device_train_batch_size gradient_accumulation_steps save_* *_save* enable_jit_checkpoint log_*
    check_reload logging_* max_learning_rate eval_* *_eval_* report_to run_name project trackio_* hub_*
    push_to_hub disable_tqdm include_* peak_tflops dataloader_* ddp_* *_timeout local_rank _n_gpu use_cpu
    use_cache skip_memory_metrics debug do_* gradient_checkpointing* activation_checkpointing*
    torch_empty_cache_steps on_spike grad_norm_limit parallelism_config accelerator_config
    restore_callback_states_from_checkpoint logging_dir early_stopping_patience load_best_model_at_end
    metric_for_best_model greater_is_better""".split()


def check_names(allowed: str | None) -> None:
    """
    Raises:
        UserError: --allow_change names what cannot change in the middle of a run.
    """
    for name in _names(allowed):
        if name not in ALLOWED:
            raise UserError(
                f"--allow_change {name} is not possible{suggest(name, ALLOWED) or '.'} "
                f"A resumed run may change {', '.join(ALLOWED)}."
            )


def _names(allowed: str | None) -> list[str]:
    return [name.strip().lstrip("-") for name in (allowed or "").split(",") if name.strip()]


def require_same_run(checkpoint: Path, before: dict[str, Any], facts: dict[str, Any], allowed: str | None):
    """Show what differs from the run that saved the checkpoint.

    Args:
        before: of that run, run.json.
        facts: of this run, likewise.
        allowed: names that may differ, commas between.
    Raises:
        UserError: others differ as well.
    """
    then, now = (_deciding(json.loads(json.dumps(run, default=str))) for run in (before, facts))
    changed = {name: (then[name], now[name]) for name in now if name in then and then[name] != now[name]}
    if not changed:
        return
    say(f"resume: other than in {checkpoint}\n" + _table(changed))
    refused = [name for name in changed if name.lstrip("-") not in _names(allowed)]
    if not refused:
        return
    why = ""
    if any(name.lstrip("-") in ROWS or name == "the content of the data" for name in refused):
        why = " The rows would come in another order."
    if "--packing_tokens" in refused:
        packed = f"--packing_tokens {then['--packing_tokens']}"
        why += f" Its rows are those of {packed} --per_device_train_batch_size {before['rows_per_batch']}."
    names = [name.lstrip("-") for name in refused]
    way = f"; --allow_change {','.join(names)} takes it" if set(names) <= set(ALLOWED) else ""
    words = "; ".join(f"{name} was {changed[name][0]}, is {changed[name][1]}" for name in refused)
    raise UserError(
        f"{checkpoint}: {words}.{why} Resume with what the run began with, or start anew in "
        f"another --output_dir{way}."
    )


def _table(changed: dict[str, tuple[Any, Any]]) -> str:
    rows = [("", "was", "is"), *((name, str(was), str(now)) for name, (was, now) in changed.items())]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _deciding(facts: dict[str, Any]) -> dict[str, Any]:
    """Whatever decides rows or results, by the name that the user knows."""
    flags = {**facts["data"], **facts["model"], **facts["lora"], **facts["training"]}
    data = [name for name in facts["data"] if name not in ROWS]  # paths and such: the content counts
    compared = [name for name in flags if not any(fnmatch(name, pattern) for pattern in [*FREE, *data])]
    return {f"--{name}": flags[name] for name in compared} | {
        "the content of the data": [str(sha256)[:12] for sha256 in facts["data_sha256"].values()],
        "the tokenizer": facts["tokenizer_sha256"][:12],
        "the base model": facts["model_sha256"][:12],
        "the DeepSpeed file": facts["zero"],
    }
