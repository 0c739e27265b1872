"""peft's own plain LoRA and AdaLoRA: names and shapes of the tensors, and the rank and scale of each module.

    LoRA       y += s · B A x                          <module>.lora_A.weight (r, in), <module>.lora_B.weight (out, r)
               convolutions: (r, C, kh, kw), (out, r, 1, 1)     embeddings: .lora_embedding_A, .lora_embedding_B
               r, α: the first matching entry of rank_pattern, alpha_pattern, else r, lora_alpha   s = α/r, rsLoRA: α/√r
    AdaLoRA    y += α/(init_r + 1e-5) · B diag(E) A x  <module>.lora_A, .lora_B, .lora_E (r, 1); E = 0 masks a triplet

init_r is the rank AdaLoRA *started* with, also where most triplets are gone: peft keeps it when it resizes a module.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from ..deltas import Inputs, Patches, Tokens
from ..deltas.inputs import VECTORS
from ..errors import CheckpointError, ConfigError, ExportError
from ..hosts.peft import checkpoint
from ..hosts.peft.checkpoint import PREFIX
from ..hosts.peft.old import translated
from ..hosts.peft.options import SHARED, check_patterns, check_types
from ..methods.base import matching
from ..methods.scaling import scale_of
from ..patterns import check_pattern, shown

Config = Mapping[str, Any]
LINEAR = (".lora_A.weight", ".lora_B.weight")
EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
PAIRS = (LINEAR, EMBEDDING)
TRIPLETS = (".lora_A", ".lora_B", ".lora_E")
ADALORA_EPSILON = 1e-5
# What describes an adapter without touching its function; copied to whatever is made from it.
DESCRIPTION = (
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "lora_dropout",
    "lora_alpha", "use_rslora", "fan_in_fan_out", "task_type", "auto_mapping", "base_model_name_or_path", "revision",
)  # fmt: skip
DESCRIBED: dict[str, Any] = {name: hint for name, (hint, _) in SHARED.items()}
DESCRIBED |= {"use_rslora": bool, "lora_dropout": float}
# Options that may have any value: they control training or loading, not what A and B mean.
HARMLESS = {
    *DESCRIPTION, "peft_type", "peft_version", "inference_mode", "r", "rank_pattern", "alpha_pattern",
    "init_lora_weights", "runtime_config", "megatron_config", "megatron_core", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "velora_config", "qalora_group_size", "ensure_weight_tying",
    "target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
}  # fmt: skip


# -- config ------------------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, by today's names. Raises CheckpointError if it cannot be read, or has impossible ranks."""
    found, path = checkpoint.read_config(folder), f"{folder}/adapter_config.json"
    if found.get("peft_type") in ("LORA", "ADALORA"):
        check_types(found, DESCRIBED, path)
        check_values(found, path)
    return translated(found)


def check_values(config: Config, path: str) -> None:
    """Raise CheckpointError for a rank that is no int ≥ 1, an alpha that is no number, a pattern that is no table."""
    adalora = config["peft_type"] == "ADALORA"
    rank, alpha = config.get("init_r") if adalora else config.get("r", 8), config.get("lora_alpha", 8)
    for kind, value, types in (("rank", rank, (int,)), ("alpha", alpha, (int, float))):
        pattern = {} if adalora else config.get(f"{kind}_pattern") or {}
        if not isinstance(pattern, dict):
            raise CheckpointError(f"{path}: {kind}_pattern={pattern!r}: expected a table; restore it from a copy")
        for name in pattern:
            try:
                check_pattern(f"{kind}_pattern", name)
            except ConfigError as error:
                raise CheckpointError(f"{path}: {error}") from None
        for found in (value, *pattern.values()):
            if type(found) not in types or not abs(found) < 2**63 or (kind == "rank" and found < 1):
                wanted = "an int of at least 1" if kind == "rank" else "a number"
                raise CheckpointError(f"{path}: {kind} {shown(found)}: expected {wanted}; restore it from a copy")


def configured(config: Config, module: str) -> tuple[int, float]:
    """Rank and scale that peft gives a module."""
    rank = matching(config.get("rank_pattern") or {}, module) or config.get("r", 8)
    alpha = matching(config.get("alpha_pattern") or {}, module)
    alpha = config.get("lora_alpha", 8) if alpha is None else alpha
    return rank, scale_of(alpha, rank, rslora=bool(config.get("use_rslora")))


def changes_base(config: Config) -> bool:
    """Was it made by an initialisation that changes the base weights? Then its A and B mean nothing on another base."""
    return str(config.get("init_lora_weights")).lower().startswith(("pissa", "olora", "corda", "loftq"))


def description(config: Config) -> LoraConfig:
    """A LoraConfig with the options that say what the adapter belongs to."""
    try:
        found = LoraConfig(**{key: config[key] for key in DESCRIPTION if config.get(key) is not None})
        check_patterns(found)
        return found
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"adapter_config.json: {error}; restore it from a copy") from error


def check_low_rank(config: Config, where: str) -> None:
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


# -- tensors -----------------------------------------------------------------------------------------------------------


def split(
    state: Mapping[str, Tensor], endings: tuple[str, ...] = LINEAR + EMBEDDING
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Factors by module and ending, linear maps first, and what is no factor by name; both without peft's prefix. A
    module with both factors has a part with the endings of one of `PAIRS`, in this order."""
    parts: dict[str, dict[str, Tensor]] = {}
    for ending in endings:
        for key, value in state.items():
            if key.endswith(ending):
                parts.setdefault(key.removeprefix(PREFIX).removesuffix(ending), {})[ending] = value
    return parts, {key.removeprefix(PREFIX): value for key, value in state.items() if not key.endswith(endings)}


def to_tensors(name: str, A: Tensor, B: Tensor, inputs: Inputs) -> dict[str, Tensor]:
    """Factors (r, in) and (out, r) of a module as peft's LoRA names and shapes them. Raises ExportError for a
    convolution whose dilation or padding mode peft's LoRA would not follow."""
    endings = EMBEDDING if isinstance(inputs, Tokens) else LINEAR
    if isinstance(inputs, Patches):
        if inputs.dilation != (1, 1) or inputs.mode != "zeros":
            raise ExportError(
                f"{name}: LoRA's convolutions have no dilation and pad with zeros, this one has dilation="
                f"{inputs.dilation} and padding_mode={inputs.mode!r}: merge the adapter into the model instead"
            )
        A, B = A.unflatten(1, (inputs.channels, *inputs.kernel)), B[:, :, None, None]
    return {PREFIX + name + endings[0]: A, PREFIX + name + endings[1]: B}


def read_factors(
    config: Config, state: Mapping[str, Tensor], where: str
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Inputs], dict[str, Tensor]]:
    """Factors of each module with its scale folded into B, what it reads, and the tensors that are no factors. Raises
    ExportError (more than low-rank, a changed base), CheckpointError (tensors are missing or have other ranks than the
    config says)."""
    check_low_rank(config, where)
    adalora = config["peft_type"] == "ADALORA"
    parts, others = split(state, TRIPLETS) if adalora else split(state)
    factors, inputs = {}, {}
    for name, part in parts.items():
        if types := {value.dtype for value in part.values()} - {*checkpoint.FLOATS.values()}:
            raise CheckpointError(f"{where}: {name} has factors of type {types.pop()}: it is damaged")
        if adalora:
            factors[name] = from_triplets(config, part, f"{where}: {name}")
        elif tuple(part) in PAIRS:
            rank, scale = configured(config, name)
            A, B, inputs[name] = from_tensors(part, rank, f"{where}: {name}")
            factors[name] = A, B * scale
    strange = next((key for key in others if ".lora_" in key or "trainable_tokens" in key), None)
    if strange is not None:
        raise ExportError(f"{where}: {strange} belongs to no linear map: merge it with peft's merge_and_unload")
    if not factors or len(factors) < len(parts):
        count = len(state) - len(others)
        raise CheckpointError(f"{where}: {count} factors of {len(factors)} modules; the adapter is damaged or empty")
    return factors, inputs, others


def from_tensors(part: Mapping[str, Tensor], rank: int, where: str) -> tuple[Tensor, Tensor, Inputs]:
    """The inverse of `to_tensors`; of a convolution only the kernel is known. Raises unless they have this rank."""
    A, B = part.values()
    inputs: Inputs = Tokens(A.shape[1]) if tuple(part) == EMBEDDING else VECTORS
    if A.dim() == B.dim() == 4:
        A, B, inputs = A.flatten(1), B.flatten(1), Patches(A.shape[1], (A.shape[2], A.shape[3]))
    if A.dim() != 2 or B.dim() != 2:
        raise ExportError(f"{where} is not a linear map (lora_A is {tuple(A.shape)}): merge it with peft")
    if A.shape[0] != rank or B.shape[1] != rank:
        raise CheckpointError(
            f"{where} has lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} but the config says rank {rank}; the "
            f"adapter is damaged"
        )
    return A, B, inputs


def shape_of(A: Tensor, B: Tensor) -> tuple[int, int] | None:
    """Of the E between these two; None if they have different ranks."""
    return (len(A), 1) if len(A) == B.shape[1] else None


def from_triplets(config: Config, part: Mapping[str, Tensor], where: str) -> tuple[Tensor, Tensor]:
    """AdaLoRA's triplets as A, and B with E and the scale in it. Raises CheckpointError if they are incomplete."""
    A, B, E = (part.get(ending) for ending in TRIPLETS)
    if A is None or B is None or E is None or {A.dim(), B.dim(), E.dim()} != {2} or shape_of(A, B) != E.shape:
        shapes = {ending[-1]: tuple(value.shape) for ending, value in part.items()}
        raise CheckpointError(f"{where} has {shapes}, expected A, B and E of one rank; it is damaged")
    given = config.get("lora_alpha", 8)
    alpha = given if given > 0 else A.shape[0]
    return A, B * (E.t().to(torch.promote_types(B.dtype, E.dtype)) * (alpha / (config["init_r"] + ADALORA_EPSILON)))
