"""The main path: flags to a fine-tuned model on disk."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from pathlib import Path
from typing import Any

from baichuan_sft.errors import UserError
from baichuan_sft.train import status
from baichuan_sft.train.args import Settings, SftTrainingArguments
from baichuan_sft.train.checks import require_warmup_ends
from baichuan_sft.train.fused import FLAGS as FUSED
from baichuan_sft.train.inputs import Inputs, read_inputs, require_same_data, restore_stream
from baichuan_sft.train.lock import locked, this_launch
from baichuan_sft.train.parse import parse
from baichuan_sft.train.processes import joined, processes
from baichuan_sft.train.progress import say
from baichuan_sft.train.signals import handled
from baichuan_sft.train.workers import naming_lost_workers
from baichuan_sft.train.zero import completed, resolve


def main(argv: list[str] | None = None) -> int:
    """Fine-tune as the flags say; see ``baichuan-sft train --help``.

    Returns:
        exit code 0; everything else is raised.
    """
    with handled():
        status.update(phase="start")
        settings = parse(sys.argv[1:] if argv is None else argv)
        lock = locked(settings.training["output_dir"], settings.training["save_on_each_node"])
        with joined(settings) as store, lock:
            status.update(phase="data")
            # Before the group exists: no rank waits in it while another tokenises for an hour.
            inputs = read_inputs(settings)
            status.update(phase="rendezvous")
            with processes(settings, store):
                status.update(phase="model")
                train(settings, inputs)
        status.update(phase="done")
    return 0


def train(settings: Settings, inputs: Inputs) -> None:
    """One run, from files to files; every rank calls it."""
    from transformers import set_seed

    from baichuan_sft.checkpoint import load_config
    from baichuan_sft.train import resume, universal
    from baichuan_sft.train.answers import answer
    from baichuan_sft.train.benchmarks import Beforehand, load_tasks
    from baichuan_sft.train.rows import lay_out, rows_per_update
    from baichuan_sft.train.same_run import require_same_run
    from baichuan_sft.train.trainer import FactsCollator, SftTrainer

    quieten_bars()
    resumed, asked = resume.choose(settings), settings.training["gradient_accumulation_steps"]
    if resumed is not None:
        settings = resume.keep_rows(settings, resumed)
    args = training_arguments(settings)
    resolve(settings.training["deepspeed"], args, load_config(settings.model.model_name_or_path))
    for notice in settings.notices:
        say(notice)
    set_seed(args.seed)
    require_same_data(inputs)
    held_out = inputs.held_out
    per_update = resumed.rows_per_update if resumed else rows_per_update(args, settings.row_shape()[1])
    record = run_record(settings, args, inputs, rows_per_update=per_update, accumulation_asked=asked)
    tasks = load_tasks(settings) if args.eval_tasks else []
    questions = questions_of(settings, inputs) if args.eval_answers else []
    rows = lay_out(settings, inputs.train, per_update)
    total = updates_in_all(args, rows, per_update)
    require_warmup_ends(args.warmup_steps, total)
    checkpoint = None
    if resumed is not None:
        require_same_run(resumed.path, resumed.facts, record.facts, args.allow_change)
        if not resume.something_left(resumed, settings, total):
            return
        checkpoint = universal.checkpoint_for(resumed, args)
        record.go_on(resumed.facts)
        if settings.data.streaming:
            restore_stream(rows, resumed.path, args.process_index)
    trainer = SftTrainer(
        model=build_model(settings, args),
        args=args,
        train_dataset=rows,
        eval_dataset=None if held_out is None else lay_out(settings, held_out, per_update, evaluate=True),
        data_collator=FactsCollator(inputs.tokenizer.pad_token_id, **batch_shape(settings, args)),
        eval_collator=FactsCollator(
            inputs.tokenizer.pad_token_id, **batch_shape(settings, args, evaluate=True)
        ),
        processing_class=inputs.tokenizer,
        record=record,
        check_reload=settings.model.check_reload,
        sources=inputs.sources,
        rows_per_batch=(settings.row_shape()[1], settings.row_shape(evaluate=True)[1]),
        rows_per_update=per_update,
        tasks=tasks,
        batch_tokens=tokens_per_batch(settings),
    )
    trainer.add_callback(Beforehand(trainer, questions))
    if checkpoint is None and args.overwrite_output_dir and args.should_save:
        resume.begin_anew(settings.training["output_dir"])
    fit(trainer, settings, checkpoint)
    trainer.score()
    if questions:
        answer(trainer, questions, "after")
    status.update(phase="save")
    trainer.save_model()
    trainer.say_skipped()
    conclude(trainer, settings)


def questions_of(settings: Settings, inputs: Inputs) -> list[dict[str, Any]]:
    from baichuan_sft.checkpoint import load_config
    from baichuan_sft.train.answers import pick_questions
    from baichuan_sft.train.inputs import data_seed

    context = load_config(settings.model.model_name_or_path).context_length
    count, seed = settings.training["eval_answers"], data_seed(settings.training)
    return pick_questions(inputs.held_out, inputs.tokenizer, count, seed=seed, context=context)


def fit(trainer: Any, settings: Settings, checkpoint: Path | None) -> None:
    """Train; what DeepSpeed's file and the flags say differently becomes one line."""
    trainer.prepare_saving()
    try:
        naming_lost_workers(
            trainer.train, resume_from_checkpoint=None if checkpoint is None else str(checkpoint)
        )
    except ValueError as error:
        if "DeepSpeed config values" not in str(error):
            raise
        raise UserError(f"{settings.training['deepspeed']}: {' '.join(str(error).split())}") from None


def updates_in_all(args: Any, rows: Any, per_update: int) -> int:
    """Updates of the whole run."""
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * -(-len(rows) // per_update))


def conclude(trainer: Any, settings: Settings) -> None:
    """How far the adapters moved, the loss curve, and the command that talks to the result."""
    from baichuan_sft.train.adapters import relative_change
    from baichuan_sft.train.record import plot_loss

    if settings.lora.use_lora and settings.lora.init_lora_weights.lower() in ("true", "gaussian"):
        # Other ways to begin put something into B A that no training has put there.
        report_change(relative_change(trainer.model))
    if settings.data.streaming:
        say(f"data, on rank 0: {trainer.train_dataset.balance()}")
    if trainer.is_world_process_zero():
        plot_loss(trainer.state.log_history, Path(trainer.args.output_dir) / "loss.png")
    quantized = f" --quantize {settings.lora.quantize}" if settings.lora.quantize else ""
    say(f"\nTalk to the result:\n  baichuan-sft chat {trainer.args.output_dir}{quantized}")


def quieten_bars() -> None:
    """transformers' bars for loading and writing, only where somebody can see them move."""
    from transformers.utils import logging

    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        logging.disable_progress_bar()


def tokens_per_batch(settings: Settings) -> int:
    """What a micro-batch of evaluation may hold."""
    capacity, size = settings.row_shape(evaluate=True)
    return size * (capacity or settings.data.model_max_length)


def batch_shape(settings: Settings, args: Any, *, evaluate: bool = False) -> dict[str, int]:
    """On a GPU packed batches are all of one shape, for which kernels are compiled once."""
    capacity = settings.row_shape(evaluate=evaluate)[0]
    if args.device.type == "cpu" or capacity is None:
        return {}
    return {"pad_to_multiple_of": 128, "pad_to_capacity": capacity}


# --- arguments, model -------------------------------------------------------------------------------


def training_arguments(settings: Settings) -> SftTrainingArguments:
    """transformers' arguments; what they refuse becomes one line.

    Raises:
        UserError: values that transformers or DeepSpeed do not take together.
    """
    values = dict(settings.training, remove_unused_columns=False) | FUSED
    if values["deepspeed"]:
        values["deepspeed"] = completed(values["deepspeed"])
    values["ignore_data_skip"] = settings.data.streaming  # a stream goes on where it was
    if values["ddp_find_unused_parameters"] is None:
        values["ddp_find_unused_parameters"] = False  # there are none, and looking for them costs a pass
    try:
        args = SftTrainingArguments(**values)
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from None
    return use_one_device(args, settings.notices)


def use_one_device(args: SftTrainingArguments, notices: list[str]) -> SftTrainingArguments:
    """Without a launcher transformers would split each batch over all GPUs by threads, a way nobody tests."""
    if args.n_gpu > 1:
        notices.append(f"1 of {args.n_gpu} GPUs is used; `deepspeed --num_gpus {args.n_gpu} ...` uses all")
        args._n_gpu = 1
    return args


def build_model(settings: Settings, args: Any) -> Any:
    """The base model with LoRA adapters, or with its frozen part; the log says what is trained."""
    from baichuan_sft.quantization import weight_bytes
    from baichuan_sft.train.adapters import add_lora, count_parameters, freeze
    from baichuan_sft.train.checkpointing import prepare
    from baichuan_sft.train.fused import fuse

    model = load_base(settings, args)
    prepare_generation(model)
    if settings.lora.use_lora:
        model = add_lora(model, settings.lora)
    elif settings.model.freeze:
        freeze(model, settings.model.freeze)
    fuse(model, settings.training)
    trained, total = count_parameters(model)
    say(f"trained parameters: {trained:,} of {total:,} ({100 * trained / total:.3g} %)")
    if settings.lora.quantize:
        gib = weight_bytes(model) / 2**30
        say(f"base: {settings.lora.quantize}, {gib:.3g} GiB of weights with the adapters")
    if args.optim != SftTrainingArguments.optim:
        say(f"optimizer: {args.optim.value}")
    prepare(model, settings, args)
    return model


def load_base(settings: Settings, args: Any) -> Any:
    """The base model, in fp32 where mixed precision runs without DeepSpeed, which keeps no master weights."""
    import torch

    from baichuan_sft.attention import choose
    from baichuan_sft.checkpoint import load_config, load_model

    path = settings.model.model_name_or_path
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    keeps_master = bool(args.deepspeed) or settings.lora.use_lora
    attn, why = choose(settings.model.attn, load_config(path).position_embedding, args.device.type, half)
    say(f"attention: {attn}, {why}")
    options: dict[str, Any] = dict(dtype=half if keeps_master else torch.float32, attn=attn)
    if settings.lora.quantize:  # on its device already while it is loaded; DeepSpeed need not move it
        options |= dict(quantize=settings.lora.quantize, device=args.device)
    return load_model(path, **options).train()


def prepare_generation(model: Any) -> None:
    """Fill in the vendor's chat settings where the base model brings none, and stop at the user's turn."""
    config = model.generation_config
    if config.max_new_tokens is None:
        config.update(do_sample=True, temperature=0.3, top_k=5, top_p=0.85, repetition_penalty=1.05)
        config.max_new_tokens = 2048
    elif not config.do_sample:
        # Greedy settings that still name a temperature load, but would not save.
        config.update(temperature=1.0, top_k=50, top_p=1.0)
    config.update(pad_token_id=0, bos_token_id=1, eos_token_id=[2, 195])
    config.user_token_id, config.assistant_token_id = 195, 196


# --- record -----------------------------------------------------------------------------------------


def run_record(settings: Settings, args: Any, inputs: Inputs, **more: Any) -> Any:
    """The facts of this run that its result carries."""
    from baichuan_sft.checkpoint.files import fingerprint
    from baichuan_sft.train.record import RunRecord, model_digest, sha256
    from baichuan_sft.train.universal import zero_facts

    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    facts = {
        "command": sys.argv,
        "launch": this_launch()[0],
        "model": dataclasses.asdict(settings.model),
        "data": {**dataclasses.asdict(settings.data), "report": inputs.report},
        "lora": dataclasses.asdict(settings.lora),
        "training": args.to_dict() | {name: settings.training[name] for name in FUSED},
        "world_size": args.world_size,
        "rows_per_batch": settings.row_shape()[1],
        **more,
        "zero": zero_facts(args),
        "base_fingerprint": fingerprint(settings.model.model_name_or_path),
        "model_sha256": model_digest(settings.model.model_name_or_path),
        "data_sha256": {source["path"]: source.get("sha256") for source in inputs.report["sources"]},
        "tokenizer_sha256": sha256(inputs.tokenizer.vocab_file),
    }
    return RunRecord(args.output_dir, facts)


def report_change(change: dict[str, float]) -> None:
    """Say how far each target moved, and warn where it did not."""
    from baichuan_sft.train.adapters import NO_CHANGE

    for name, size in change.items():
        say(f"relative change of {name}: {size:.2e}")
        if size < NO_CHANGE:
            say(
                f"warning: {name} has hardly changed ({size:.1e}); "
                "more steps, a higher --learning_rate or --lora_rank?"
            )
