"""How fast a run is and what it takes, between two lines of its log."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator
from typing import Any

import torch

from baichuan_sft.plan import GIB, flops_per_token, peak_tflops


class Speed:
    """Counts tokens of this rank; ``read`` sums them up over all ranks and starts anew.

    Args:
        model: with its adapters, if it has any. args: training arguments.
    """

    def __init__(self, model: Any, args: Any) -> None:
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
        lora = any(name.endswith(".lora_A") for name, _ in model.named_modules())
        self.lora, self.adapter_parameters = lora, trained if lora else 0
        self.config, self.args = model.config, args
        frozen = not lora and not all(p.requires_grad for p in model.parameters())
        self.peak = None if frozen else peak_flops(args)  # who needs which gradient is not in the formula
        self.counts = torch.zeros(4, dtype=torch.float64)  # computed, real, target tokens; squared lengths
        self.since = time.monotonic()

    def add(self, computed: int, real: int, targets: int, squared_lengths: int) -> None:
        self.counts += torch.tensor([computed, real, targets, squared_lengths])

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Evaluating and saving do not make training seem slower."""
        started = time.monotonic()
        yield
        self.since += time.monotonic() - started

    def read(self, accelerator: Any) -> dict[str, float]:
        """Of all ranks together since the last call.

        tokens_per_second, targets_per_second, padding_share; mfu: model FLOPs of real tokens, the head's of
        targets only, as a share of what all devices could do; peak_gib: of the rank that has most: the
        highest point on its GPU since the last call, or of the process in host memory since its start.
        """
        device = self.args.device
        computed, real, targets, squared = accelerator.reduce(self.counts.to(device), "sum").tolist()
        seconds = time.monotonic() - self.since
        memory = torch.tensor([peak_bytes(device)], dtype=torch.float64, device=device)
        logs = {
            "tokens_per_second": real / seconds,
            "targets_per_second": targets / seconds,
            "padding_share": 1 - real / max(computed, 1),
            "peak_gib": accelerator.gather(memory).max().item() / GIB,
        }
        if self.peak is not None:
            each = flops_per_token(
                self.config,
                lora=self.lora,
                span=squared / max(real, 1),
                target_share=targets / max(real, 1),
                adapter_parameters=self.adapter_parameters,
            )
            logs["mfu"] = real * each / seconds / (self.peak * self.args.world_size)
        self.counts.zero_()
        self.since = time.monotonic()
        return logs


def peak_flops(args: Any) -> float | None:
    """FLOP/s that one device could do: as said, or by its name; the table is of half precision only."""
    stated = args.peak_tflops
    if stated is None and args.device.type == "cuda" and (args.bf16 or args.fp16):
        stated = peak_tflops(torch.cuda.get_device_name(args.device))
    return None if stated is None else stated * 1e12


def peak_bytes(device: torch.device) -> float:
    """Highest allocation on a GPU since the last call; on a CPU the process's, which cannot be set back."""
    if device.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak
