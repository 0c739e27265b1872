"""Plain LoRA configs made of an adapter: of its allocation, to train anew, or of what an export writes."""

import math
import os
import re
from collections.abc import Iterable
from typing import Any

from peft import LoraConfig
from torch import nn

from ..errors import ExportError
from ..hosts.peft.handle import warn_of_budget
from ..methods.base import matching
from ..methods.scaling import scale_of
from .adapters import Adapter, read_adapter


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
    warn_of_budget(adapter.ranks, adapter.budget, adapter.steps)
    ranks = {name: rank for name, rank in adapter.ranks.items() if rank}
    if not ranks:
        raise ExportError("no module has any rank: there is no allocation to take over; train first")
    mean = sum(ranks.values()) / len(adapter.ranks)
    alpha = adapter.config.lora_alpha if lora_alpha is None else lora_alpha
    stabilised = options.get("use_rslora", False)  # peft will divide by the root of the rank
    scale = scale_of(alpha, mean, rslora=stabilised or adapter.config.use_rslora)
    divisor = math.sqrt if stabilised else float
    r = max(1, round(mean))
    alphas = {name: scale * divisor(rank) for name, rank in ranks.items()}
    return plain_config(
        adapter, ranks, r=r, lora_alpha=scale * divisor(r), rank_pattern=ranks, alpha_pattern=alphas, **options
    )


def plain_config(adapter: Adapter, modules: Iterable[str], **options: Any) -> LoraConfig:
    """A LoraConfig for these modules with what the adapter was trained beside; `options` go first. peft reads patterns
    as regular expressions for the whole name or its ending, and takes the first that matches: raises ExportError if it
    would read another module's entry of `rank_pattern` for some module."""
    ranks = options["rank_pattern"]
    ordered = dict(sorted(ranks.items()))  # as adapter_config.json lists them
    for name, rank in ranks.items():
        if matching(ordered, name) != rank:
            raise ExportError(f"no pattern matches {name} alone: use layout='uniform' (--layout uniform)")
    shared = ("modules_to_save", "lora_dropout", "fan_in_fan_out", "task_type")
    described = {option: getattr(adapter.config, option) for option in shared}
    return LoraConfig(target_modules=targets(set(modules), adapter), **described | options)


def targets(chosen: set[str], adapter: Adapter) -> list[str] | str:
    """The shortest names that match these modules of the base model and no others; a regular expression where no list
    can. Without the base model at hand: the adapter's own names if all its modules are meant, else names in full."""
    native = adapter.config
    if adapter.every is None:
        own = native.target_modules if isinstance(native.target_modules, list | set) else ()
        named = all(any(f".{name}".endswith(f".{target}") for target in own) for name in chosen)
        plain = named and chosen == set(adapter.factors)
        filtered = native.exclude_modules or native.layers_to_transform is not None
        return sorted(native.target_modules) if plain and not filtered else sorted(chosen)
    others = [f".{name}" for name in adapter.every - chosen]

    def fits_others(ending: str) -> bool:
        return any(other.endswith(f".{ending}") for other in others)

    endings = {name: name.rpartition(".")[2] for name in chosen}
    names = {name if fits_others(ending) else ending for name, ending in endings.items()}
    if any(map(fits_others, names)):
        return "|".join(re.escape(name) for name in sorted(chosen))
    return sorted(names)
