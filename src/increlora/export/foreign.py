"""Adapters of peft's own: plain LoRA and AdaLoRA, from a live model or from their folder, as factors of ΔW = B A.

    LoRA       s · B A                                 rank_pattern, alpha_pattern and rsLoRA folded into B
    AdaLoRA    α/(ranknum + 1e-5) · B diag(E) A        E = 0 masks a triplet: it is dropped, as all zeros are

ranknum is the rank AdaLoRA *started* with, also where most triplets are gone: peft keeps it when it resizes a module,
and does not write it to the file; there it is `init_r`.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.adalora import AdaLoraConfig
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import Tensor, nn

from ..deltas import Inputs
from ..errors import CheckpointError, ExportError
from .lora_format import (
    ENDINGS,
    PREFIX,
    TOKEN_ENDINGS,
    changes_base,
    configured_rank,
    configured_scale,
    from_tensors,
    lora_modules,
)

Factors = dict[str, tuple[Tensor, Tensor]]
ADALORA_EPSILON = 1e-5
# What describes an adapter without touching its function; copied to whatever is made from it.
DESCRIPTION = (
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "lora_dropout",
    "lora_alpha", "use_rslora", "fan_in_fan_out", "task_type", "auto_mapping", "base_model_name_or_path", "revision",
)  # fmt: skip
# Options that may have any value: they steer training or loading, not what A and B mean.
HARMLESS = {
    *DESCRIPTION, "peft_type", "peft_version", "inference_mode", "r", "rank_pattern", "alpha_pattern", "use_rslora",
    "init_lora_weights", "runtime_config", "megatron_config", "megatron_core", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "velora_config", "qalora_group_size", "ensure_weight_tying",
    "target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
}  # fmt: skip


def described(config: Mapping[str, Any]) -> LoraConfig:
    """A LoraConfig with the options that say what the adapter belongs to."""
    try:
        return LoraConfig(**{key: config[key] for key in DESCRIPTION if config.get(key) is not None})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"adapter_config.json: {error}; restore it from a copy") from error


def refuse_nonlinear(config: Mapping[str, Any], where: str) -> None:
    """Raise ExportError for an option under which the adapter is more than B A, or belongs to a changed base."""
    for option, value in config.items():
        if option not in HARMLESS and value and value != "none":
            raise ExportError(
                f"{where}: {option}={value!r} makes it more than a plain low-rank adapter: merge it with peft's "
                f"merge_and_unload instead"
            )
    if changes_base(config):
        raise ExportError(
            f"{where}: init_lora_weights={config['init_lora_weights']!r} changed the base weights: save it with peft's "
            f"path_initial_model_for_weight_conversion first"
        )


@dataclass(frozen=True)
class Found:
    """Factors of each module with its scale folded into B, what it reads, and the tensors that are no factors."""

    factors: Factors
    inputs: Mapping[str, Inputs]
    others: Mapping[str, Tensor]


def lora_factors(config: Mapping[str, Any], state: Mapping[str, Tensor], where: str) -> Found:
    """What a state dict of peft's LoRA holds.

    Raises: ExportError (see `refuse_nonlinear`), CheckpointError if tensors are missing or not of the configured rank.
    """
    refuse_nonlinear(config, where)
    factors: Factors = {}
    inputs: dict[str, Inputs] = {}
    embeddings = lora_modules(state, TOKEN_ENDINGS)
    for name in (*lora_modules(state), *embeddings):
        A, B, inputs[name] = from_tensors(name, state)
        rank = configured_rank(config, name)
        if A.dim() != 2 or B.dim() != 2:
            raise ExportError(f"{where}: {name} is no linear map (lora_A is {tuple(A.shape)}): merge it with peft")
        if A.shape[0] != rank or B.shape[1] != rank:
            raise CheckpointError(
                f"{where}: {name} has lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} but the config says rank "
                f"{rank}; the adapter is damaged"
            )
        factors[name] = A, B * configured_scale(config, name)
    tensors = [key for key in state if key.endswith(ENDINGS + TOKEN_ENDINGS)]
    others = {key.removeprefix(PREFIX): value for key, value in state.items() if key not in tensors}
    check_complete(where, factors, len(tensors), others)
    return Found(factors, inputs, others)


def adalora_factors(config: Mapping[str, Any], state: Mapping[str, Tensor], where: str) -> Found:
    """As `lora_factors`, for the state dict that peft saves of an AdaLoRA adapter."""
    refuse_nonlinear(config, where)
    parts: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, value in state.items():
        module, _, letter = key.removeprefix(PREFIX).rpartition(".")
        if letter in ("lora_A", "lora_B", "lora_E"):
            parts.setdefault(module, {})[letter[-1]] = value
        else:
            others[key.removeprefix(PREFIX)] = value
    factors = {}
    for name, part in parts.items():
        if set(part) != set("ABE") or not part["A"].shape[0] == part["B"].shape[1] == part["E"].shape[0]:
            shapes = {letter: tuple(value.shape) for letter, value in part.items()}
            raise CheckpointError(f"{where}: {name} has {shapes}, expected A, B and E of one rank; it is damaged")
        given = config.get("lora_alpha", 8)
        alpha = given if given > 0 else part["A"].shape[0]
        factors[name] = triplets(part["A"], part["E"], part["B"], alpha / (config["init_r"] + ADALORA_EPSILON))
    check_complete(where, factors, 2 * len(factors), others)
    return Found(factors, {}, others)


def triplets(A: Tensor, E: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(A, B) with E and scale folded into B: a masked triplet has E = 0, so it becomes a zero column."""
    return A, B * (E.t() * scale)


def check_complete(where: str, factors: Factors, tensors: int, others: Mapping[str, Any]) -> None:
    """Raise unless every factor found its partner and nothing else is left of an adapter."""
    strange = next((key for key in others if ".lora_" in key or "trainable_tokens" in key), None)
    if strange is not None:
        raise ExportError(f"{where}: {strange} belongs to no linear map: merge it with peft's merge_and_unload")
    if not factors or tensors != 2 * len(factors):
        raise CheckpointError(f"{where}: {tensors} factors of {len(factors)} modules; the adapter is damaged or empty")


def live_factors(model: nn.Module, adapter: str, config: LoraConfig) -> Found:
    """As above for a live adapter of peft's own."""
    where, pattern = f"adapter {adapter!r}", config.rank_pattern
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about modules that AdaLoRA left without rank, and embeddings
        state = get_peft_model_state_dict(model, adapter_name=adapter)
    config.rank_pattern = pattern  # saving AdaLoRA writes shorter names into the live config
    if not isinstance(config, AdaLoraConfig):
        return lora_factors(config.to_dict(), state, where)
    refuse_nonlinear(config.to_dict(), where)
    factors = {}
    for name, layer in model.named_modules():
        if isinstance(layer, AdaLoraLayer) and adapter in layer.lora_A:
            if layer.lora_A[adapter].shape[1] != layer.in_features:
                raise ExportError(f"{where}: {name} is no linear map: merge it with peft")
            scale = layer.scaling[adapter] / (float(layer.ranknum[adapter]) + ADALORA_EPSILON)
            A, E, B = (getattr(layer, f"lora_{letter}")[adapter].detach() for letter in "AEB")
            factors[name.removeprefix(PREFIX)] = triplets(A, E, B, scale)
    letters = ("lora_A", "lora_B", "lora_E")
    named = {key.removeprefix(PREFIX): value for key, value in state.items() if key.rpartition(".")[2] not in letters}
    check_complete(where, factors, 2 * len(factors), named)
    return Found(factors, {}, named)
