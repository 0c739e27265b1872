"""peft's own plain LoRA and AdaLoRA, from a live model or from a folder, as factors of ΔW = B A.

    LoRA       s · B A                                 rank_pattern, alpha_pattern and rsLoRA folded into B
    AdaLoRA    α/(init_r + 1e-5) · B diag(E) A         E = 0 masks a triplet: it becomes a zero column of B

init_r is the rank AdaLoRA *started* with, also where most triplets are gone: peft keeps it when it resizes a module.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, get_peft_model_state_dict
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

ADALORA_EPSILON = 1e-5
# What describes an adapter without touching its function; copied to whatever is made from it.
DESCRIPTION = (
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "lora_dropout",
    "lora_alpha", "use_rslora", "fan_in_fan_out", "task_type", "auto_mapping", "base_model_name_or_path", "revision",
)  # fmt: skip
# Options that may have any value: they control training or loading, not what A and B mean.
HARMLESS = {
    *DESCRIPTION, "peft_type", "peft_version", "inference_mode", "r", "rank_pattern", "alpha_pattern", "use_rslora",
    "init_lora_weights", "runtime_config", "megatron_config", "megatron_core", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "velora_config", "qalora_group_size", "ensure_weight_tying",
    "target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
}  # fmt: skip


@dataclass(frozen=True)
class ForeignState:
    """Factors of each module with its scale folded into B, what it reads, and the tensors that are no factors."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    inputs: Mapping[str, Inputs]
    others: Mapping[str, Tensor]


def live_state(model: nn.Module, adapter: str) -> ForeignState:
    """The state of a live adapter of peft's own. Raises: as `foreign_state`."""
    config = model.peft_config[adapter]  # type: ignore[index]
    pattern, config.rank_pattern = config.rank_pattern, None  # by its pattern AdaLoRA would leave triplets out
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about modules that AdaLoRA left without rank, and embeddings
            state = get_peft_model_state_dict(model, adapter_name=adapter)
    finally:
        config.rank_pattern = pattern
    return foreign_state(config.to_dict(), state, f"adapter {adapter!r}")


def foreign_state(config: Mapping[str, Any], state: Mapping[str, Tensor], where: str) -> ForeignState:
    """What a state dict of peft's LoRA or AdaLoRA holds.

    Raises: ExportError (more than low-rank, a changed base), CheckpointError (tensors are missing or have other ranks
        than the config says)."""
    check_low_rank(config, where)
    kind = config["peft_type"]
    return (lora_state if kind == "LORA" else adalora_state)(config, state, where)


def check_low_rank(config: Mapping[str, Any], where: str) -> None:
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


def lora_state(config: Mapping[str, Any], state: Mapping[str, Tensor], where: str) -> ForeignState:
    factors, inputs = {}, {}
    for name in (*lora_modules(state), *lora_modules(state, TOKEN_ENDINGS)):
        A, B, inputs[name] = from_tensors(name, state)
        rank = configured_rank(config, name)
        if A.dim() != 2 or B.dim() != 2:
            raise ExportError(f"{where}: {name} is not a linear map (lora_A is {tuple(A.shape)}): merge it with peft")
        if A.shape[0] != rank or B.shape[1] != rank:
            raise CheckpointError(
                f"{where}: {name} has lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} but the config says rank "
                f"{rank}; the adapter is damaged"
            )
        factors[name] = A, B * configured_scale(config, name)
    others = {k.removeprefix(PREFIX): v for k, v in state.items() if not k.endswith(ENDINGS + TOKEN_ENDINGS)}
    check_complete(where, len(factors), len(state) - len(others), others)
    return ForeignState(factors, inputs, others)


def adalora_state(config: Mapping[str, Any], state: Mapping[str, Tensor], where: str) -> ForeignState:
    parts: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, value in state.items():
        module, _, entry = key.removeprefix(PREFIX).rpartition(".")
        if entry in ("lora_A", "lora_B", "lora_E"):
            parts.setdefault(module, {})[entry[-1]] = value
        else:
            others[key.removeprefix(PREFIX)] = value
    factors = {}
    for name, part in parts.items():
        if set(part) != set("ABE") or not part["A"].shape[0] == part["B"].shape[1] == part["E"].shape[0]:
            shapes = {letter: tuple(value.shape) for letter, value in part.items()}
            raise CheckpointError(f"{where}: {name} has {shapes}, expected A, B and E of one rank; it is damaged")
        given = config.get("lora_alpha", 8)
        alpha = given if given > 0 else part["A"].shape[0]
        factors[name] = part["A"], part["B"] * (part["E"].t() * (alpha / (config["init_r"] + ADALORA_EPSILON)))
    check_complete(where, len(factors), 2 * len(factors), others)
    return ForeignState(factors, {}, others)


def check_complete(where: str, modules: int, tensors: int, others: Mapping[str, Any]) -> None:
    """Raise unless every factor has its partner and the other tensors belong to no adapter."""
    strange = next((key for key in others if ".lora_" in key or "trainable_tokens" in key), None)
    if strange is not None:
        raise ExportError(f"{where}: {strange} belongs to no linear map: merge it with peft's merge_and_unload")
    if not modules or tensors != 2 * modules:
        raise CheckpointError(f"{where}: {tensors} factors of {modules} modules; the adapter is damaged or empty")


def description(config: Mapping[str, Any]) -> LoraConfig:
    """A LoraConfig with the options that say what the adapter belongs to."""
    try:
        return LoraConfig(**{key: config[key] for key in DESCRIPTION if config.get(key) is not None})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"adapter_config.json: {error}; restore it from a copy") from error
