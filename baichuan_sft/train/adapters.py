"""What is trained: LoRA adapters, or all weights less the frozen ones."""

from __future__ import annotations

import contextlib
import fnmatch
from typing import Any

import torch
from torch import nn

from baichuan_sft.errors import UserError, suggest
from baichuan_sft.quantization import num_elements
from baichuan_sft.train.args import LoraArguments
from baichuan_sft.variants import LINEARS

# Below this relative size the adapters changed nothing that could be seen in an answer.
NO_CHANGE = 1e-6


def lora_targets(spec: str, model: nn.Module) -> list[str]:
    """Module names of ``--lora_target``, each of which the model has.

    Args:
        spec: names with commas between, or ``all-linear``: every linear of a decoder layer.
    Raises:
        UserError: a name that the model does not have, even where another of them matches; or the head.
    """
    modules = {
        name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    known = [name for name in LINEARS if name in modules]
    names = known if spec == "all-linear" else [name.strip() for name in spec.split(",")]
    for name in names:
        if name == "lm_head":
            raise UserError(
                "--lora_target lm_head: the head computes the loss itself, an adapter would bypass it. "
                f"Targets: {', '.join(known)}, or all-linear."
            )
        if name not in known:
            raise UserError(
                f"--lora_target {name}: no such module{suggest(name, known) or '.'} "
                f"Targets: {', '.join(known)}, or all-linear."
            )
    return names


def add_lora(model: Any, args: LoraArguments) -> Any:
    """The model with fresh adapters; only they are trained.

    Raises:
        UserError: unknown target, or a way to initialise that PEFT does not have.
    """
    from peft import LoraConfig, get_peft_model

    words: dict[str, Any] = {"true": True, "false": False}
    options: dict[str, Any] = dict(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=lora_targets(args.lora_target, model),
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
        init_lora_weights=words.get(args.init_lora_weights.lower(), args.init_lora_weights),
    )
    try:
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    except ValueError as error:
        raise UserError(f"--init_lora_weights {args.init_lora_weights}: {error}") from None


def freeze(model: nn.Module, patterns: str) -> None:
    """Stop training of the parameters that match a shell pattern (``model.layers.0.*``) or lie under a name.

    Raises:
        UserError: a pattern that matches nothing, or nothing left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in map(str.strip, patterns.split(",")):
        matched = [
            name for name in parameters if fnmatch.fnmatch(name, pattern) or name.startswith(pattern + ".")
        ]
        if not matched:
            raise UserError(f"--freeze {pattern}: no parameter of that name, e.g. {next(iter(parameters))}.")
        for name in matched:
            parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise UserError(f"--freeze {patterns}: nothing is left to train.")


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Parameters that are trained, and all; whole numbers under ZeRO-3 and of a quantised base too."""
    sizes = [(num_elements(p), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def gathered(parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
    """Makes ZeRO-3 parameters whole inside; every rank must enter it."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


@torch.no_grad()
def relative_change(model: nn.Module) -> dict[str, float]:
    """Size of the LoRA update against its weight, ||s B A|| / ||W|| (Frobenius), the mean per target name."""
    from peft.utils.integrations import dequantize_module_weight

    sizes: dict[str, list[float]] = {}
    for name, module in model.named_modules():
        if not getattr(module, "lora_A", None):
            continue
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight  # type: ignore[index]
        base = module.get_base_layer()  # type: ignore[operator]
        with gathered([a, b, base.weight]):
            # ||BA||^2 = tr(B'B AA'): the product itself would be as large as the weight
            squared = ((b.float().T @ b.float()) * (a.float() @ a.float().T)).sum().clamp_min(0)
            norm = torch.linalg.vector_norm(dequantize_module_weight(base), dtype=torch.float32)
            scale = module.scaling["default"]  # type: ignore[index]
            sizes.setdefault(name.rpartition(".")[2], []).append((scale * squared.sqrt() / norm).item())
    return {name: sum(values) / len(values) for name, values in sizes.items()}
