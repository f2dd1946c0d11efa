"""What a run says while it runs: a bar on a terminal, else lines."""

from __future__ import annotations

import os
import time

from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState


def say(message: str) -> None:
    """One line of the run's log, from rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def describe(logs: dict[str, float]) -> dict[str, str]:
    """A log event in the few words that fit beside a progress bar; none of what nobody waits for."""
    if "eval_loss" in logs:
        return {
            "eval_loss": f"{logs['eval_loss']:.4f}",
            "perplexity": f"{logs['eval_perplexity']:.3f}",
            "accuracy": f"{logs['eval_token_accuracy']:.1%}",
        }
    if scores := scores_of(logs):
        return {name: f"{value:.1f} [{low:.1f}, {high:.1f}]" for name, (value, low, high) in scores.items()}
    if "loss" not in logs:
        return {}
    return {
        "loss": f"{logs['loss']:.4f}",
        "grad": f"{logs.get('grad_norm', 0.0):.3f}",
        "lr": f"{logs['learning_rate']:.2e}",
        "tok/s": f"{logs['tokens_per_second']:,.0f}",
        "targets/s": f"{logs['targets_per_second']:,.0f}",
        "padding": f"{logs['padding_share']:.0%}",
        **({"mfu": f"{logs['mfu']:.1%}"} if "mfu" in logs else {}),
        "GiB": f"{logs['peak_gib']:.1f}",
    }


def scores_of(logs: dict[str, float]) -> dict[str, tuple[float, float, float]]:
    """Of each benchmark that a log event tells: its score and the ends of its interval."""
    names = [key.removesuffix("_low") for key in logs if key.startswith("eval_") and key.endswith("_low")]
    return {name[5:]: (logs[name], logs[f"{name}_low"], logs[f"{name}_high"]) for name in names}


def line_of(state: TrainerState, logs: dict[str, float]) -> str:
    words = " ".join(f"{name} {value}" for name, value in describe(logs).items())
    return f"step {state.global_step}/{state.max_steps} {words}"


class ProgressBar(ProgressCallback):
    """One line on a terminal: steps, time left, loss, speed."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        if "loss" in (logs or {}):
            self.training_bar.set_postfix(describe(logs))
        elif describe(logs or {}):
            self.training_bar.write(line_of(state, logs))


class LogLines(PrinterCallback):
    """One line per log event where there is no terminal, with the time left."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.first = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not describe(logs or {}):
            return
        if "loss" not in logs:
            print(line_of(state, logs), flush=True)
            return
        per_step = (time.monotonic() - self.started) / max(state.global_step - self.first, 1)
        left = per_step * (state.max_steps - state.global_step)
        print(f"{line_of(state, logs)} left {left:.0f} s", flush=True)
