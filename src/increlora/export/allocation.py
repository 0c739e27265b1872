"""The trained allocation as a plain LoRA config: the same ranks, fresh weights, nothing adaptive."""

import math
import os
from typing import Any

from peft import LoraConfig
from torch import nn

from ..errors import ExportError
from ..methods.scaling import scale_of
from .adapters import read_adapter
from .targets import check_patterns, targets


def allocation_to_lora_config(
    model_or_path: nn.Module | str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    lora_alpha: float | None = None,
    **options: Any,
) -> LoraConfig:
    """A stock LoraConfig whose `rank_pattern` is where an adapter put its rank, to train a fixed-rank LoRA there.

        rank_i as trained     alpha_i = s · rank_i     s = α / mean rank, rank-stabilised: over its root

    One scale s for all modules, as LoRA of the mean rank would have it and as IncreLoRA's `scaling="constant"` has it
    once its budget is spent: wide and narrow modules learn at the same pace. `r` is the mean rank, rounded; every
    module has its own entry. Modules without rank are no targets.

    Args:
        model_or_path: as for `export_lora`: an adapter of ours (its active ranks), peft's LoRA or AdaLoRA (the
            components that are not zero), live or in its folder.
        adapter_name: default the active adapter; of a folder: its subfolder.
        lora_alpha: α; default the adapter's own.
        options: further options of LoraConfig, `use_rslora` among them; they go before what is taken over
            (`modules_to_save`, `lora_dropout`, `fan_in_fan_out`, `task_type`).
    Raises: ExportError (no adapter, no rank anywhere, names that no pattern matches alone), CheckpointError (damaged).
    """
    adapter = read_adapter(model_or_path, adapter_name)
    ranks = {name: rank for name, rank in adapter.ranks.items() if rank}
    if not ranks:
        raise ExportError("no module has any rank: there is no allocation to take over; train first")
    mean = sum(ranks.values()) / len(adapter.ranks)
    alpha = adapter.config.lora_alpha if lora_alpha is None else lora_alpha
    stabilised = options.get("use_rslora", False)  # peft will divide by the root of the rank
    scale = scale_of(alpha, mean, rslora=stabilised or adapter.config.use_rslora)
    divisor = math.sqrt if stabilised else float
    alphas = {name: scale * divisor(rank) for name, rank in ranks.items()}
    check_patterns(ranks)
    taken = ("modules_to_save", "lora_dropout", "fan_in_fan_out", "task_type")
    described = {option: getattr(adapter.config, option) for option in taken}
    r = max(1, round(mean))
    return LoraConfig(
        r=r,
        lora_alpha=scale * divisor(r),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        target_modules=targets(list(ranks), adapter),
        **described | options,
    )
