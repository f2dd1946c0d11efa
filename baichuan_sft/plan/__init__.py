"""What a training run needs and how fast it can be: arithmetic, without torch and without a device."""

from baichuan_sft.plan.flops import PEAK_TFLOPS, flops_per_token, linear_shapes, num_parameters, peak_tflops
from baichuan_sft.plan.memory import (
    GIB,
    LEVELS,
    LOGITS_PER_CHUNK,
    Memory,
    Step,
    estimate,
    gib,
    kept_by_layer,
    reserve,
)

__all__ = [
    "GIB",
    "LEVELS",
    "LOGITS_PER_CHUNK",
    "PEAK_TFLOPS",
    "Memory",
    "Step",
    "estimate",
    "flops_per_token",
    "gib",
    "kept_by_layer",
    "linear_shapes",
    "num_parameters",
    "peak_tflops",
    "reserve",
]
