"""A new adapter as a weighted sum of others: ΔW = Σ w_i ΔW_i, module by module, of whatever methods they are.

    cat    A = [A_1; A_2; …]   B = [w_1 B_1, w_2 B_2, …]     exact; the ranks add up
    svd    the same, truncated to the strongest ranks        the error of each module is returned

The sum is a plain low-rank adapter of fixed ranks, so it trains, saves, merges and exports like any other.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor

from ...deltas import Delta
from ...errors import ConfigError
from .config import CONFIGS, type_name
from .layer import adapter_layers
from .truncation import truncated


def add(
    tuner: Any, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str = "svd",
    svd_rank: int | None = None, **others: Any,
) -> dict[str, float]:  # fmt: skip
    """Add a frozen adapter ΔW = Σ w_i ΔW_i to a model; `set_adapter` makes it the active one.

    Args:
        adapters, weights: names of adapters, of any methods of ours, and a number for each.
        combination_type: `cat`, exact, or `svd`, truncated to `svd_rank` (default: the largest rank that one of them
            has in the module).
    Returns: module → relative Frobenius error of the truncation.
    Raises: ConfigError (unknown adapter, a name that is taken or cannot be one, another combination, a rank that is no
        int >= 1, `modules_to_save`). The model is then unchanged.
    """
    check_combination(combination_type, svd_rank, others)
    check_summands(tuner, adapters, weights, adapter_name)
    parts: dict[str, list[tuple[float, Delta]]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, layer in adapter_layers(tuner.model, adapter).items():
            parts.setdefault(name, []).append((weight * layer.scales.get(adapter, 1.0), layer.delta(adapter)))
    sums = {name: weighted_sum(part, svd_rank, exact=combination_type == "cat") for name, part in parts.items()}
    ranks = {name: max(1, A.shape[0]) for name, (A, _, _) in sums.items()}
    longest_first = sorted(ranks, key=len, reverse=True)  # a pattern also fits names that end in it; the first counts
    patterns, top = {re.escape(name): ranks[name] for name in longest_first}, max(ranks.values())
    like = tuner.peft_config[adapters[0]]
    tuner.peft_config[adapter_name] = CONFIGS[type_name("lora")](
        r=top, lora_alpha=top, rank_pattern=patterns, alpha_pattern=dict(patterns), target_modules=set(ranks),
        task_type=like.task_type, base_model_name_or_path=like.base_model_name_or_path,
    )  # fmt: skip
    try:
        tuner.inject_adapter(tuner.model, adapter_name)
    except Exception:
        del tuner.peft_config[adapter_name]
        raise
    for name, layer in adapter_layers(tuner.model, adapter_name).items():
        A, B, _ = sums[name]
        delta: Any = layer.delta(adapter_name)
        if A.shape[0]:  # without any rank the delta's own stays, which adds nothing
            delta.to(A.dtype)  # that of the summands, where peft made them wider than the base
            with torch.no_grad():
                for p, values in zip(delta.block(0).values(), (A, B), strict=True):
                    p.copy_(values)
    return {name: error for name, (_, _, error) in sums.items()}


def check_combination(combination_type: str, svd_rank: Any, others: Mapping[str, Any]) -> None:
    """Raise ConfigError for peft's other combinations, and for options that do not go with the combination."""
    if combination_type not in ("cat", "svd"):
        raise ConfigError(
            f"combination_type={combination_type!r} is not supported: it mixes factors entry by entry, which adapters "
            f"of different ranks do not allow; use 'cat' (exact; the ranks add up) or 'svd' (truncated to `svd_rank`)"
        )
    if svd_rank is not None and combination_type == "cat":
        raise ConfigError(f"svd_rank={svd_rank!r}: 'cat' is exact; leave it out, or use combination_type='svd'")
    if svd_rank is not None and (type(svd_rank) is not int or svd_rank < 1):
        raise ConfigError(f"svd_rank={svd_rank!r}: expected an int >= 1, or None for the largest rank of the adapters")
    for name, value in others.items():
        raise ConfigError(f"{name}={value!r} is not supported: 'cat' and 'svd' have no such option; leave it out")


def check_summands(tuner: Any, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    """Raise ConfigError for what cannot be added up, or not this way."""
    known = tuner.peft_config
    if adapter_name in known:
        raise ConfigError(f"there is an adapter {adapter_name!r} already: choose another name, or delete it first")
    if missing := [name for name in adapters if name not in known]:
        raise ConfigError(f"Adapter {missing[0]} does not exist; there are {', '.join(known)}")
    if not adapters or len(adapters) != len(weights):
        raise ConfigError(f"give one weight for each adapter: {len(adapters)} adapters, {len(weights)} weights")
    for module, wrapper in tuner.model.named_modules():
        saved = wrapper.modules_to_save if isinstance(wrapper, ModulesToSaveWrapper) else ()
        if whole := [name for name in adapters if name in saved]:
            raise ConfigError(
                f"{module}: {', '.join(whole)} trained it whole (`modules_to_save`), which has no sum: use these "
                f"adapters one at a time (`set_adapter`), or train them without it"
            )


@torch.no_grad()
def weighted_sum(
    parts: Sequence[tuple[float, Delta]], rank: int | None, *, exact: bool
) -> tuple[Tensor, Tensor, float]:
    """A and B of Σ w ΔW, in float32 at least, and the relative error of their truncation."""
    factors = [(weight, *delta.factors()) for weight, delta in parts]
    A = torch.cat([A for _, A, _ in factors])
    A = A.to(torch.promote_types(A.dtype, torch.float32))
    B = torch.cat([weight * B.to(A.dtype) for weight, _, B in factors], dim=1)
    return truncated(A, B, len(A) if exact else rank or max(1, *(len(A) for _, A, _ in factors)))
