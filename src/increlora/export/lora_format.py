"""What peft reads out of a plain LoRA folder: which tensors belong together, and the rank and scale of each module.

<prefix><module>.lora_A.weight (r, in)      <prefix><module>.lora_B.weight (out, r)      y += s · B A x
convolutions: (r, C, kh, kw), (out, r, 1, 1)      embeddings: .lora_embedding_A (r, in), .lora_embedding_B (out, r)
r, α: the first matching entry of rank_pattern, alpha_pattern, else r, lora_alpha      s = α/r, rsLoRA: α/√r
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..deltas import Inputs, Patches, Tokens
from ..deltas.inputs import VECTORS
from ..errors import CheckpointError
from ..hosts.peft.checkpoint import PREFIX
from ..hosts.peft.old import translated

Shape = tuple[int, ...]
ENDINGS = (".lora_A.weight", ".lora_B.weight")
TOKEN_ENDINGS = (".lora_embedding_A", ".lora_embedding_B")
# Initialisations that change the base weights when the adapter is made: their A and B mean nothing on another base.
BASE_CHANGING = ("pissa", "olora", "corda", "loftq")


def configured_rank(config: Mapping[str, Any], module: str) -> int:
    """Rank that peft gives a module."""
    return int(matched(config.get("rank_pattern"), module, config.get("r", 8)))


def configured_scale(config: Mapping[str, Any], module: str) -> float:
    """Scale that peft applies to a module."""
    rank = configured_rank(config, module)
    alpha = float(matched(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def matched(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Value of the first key that matches the module's name or its ending, as a regular expression."""
    try:
        return (pattern or {}).get(get_pattern_key(list(pattern or {}), module), default)
    except re.error as error:
        raise CheckpointError(
            f"a pattern of the adapter is not a regular expression ({error}): restore its config"
        ) from None


def changes_base(config: Mapping[str, Any]) -> bool:
    """Was the adapter made by an initialisation that changes the base weights?"""
    return str(config.get("init_lora_weights")).lower().startswith(BASE_CHANGING)


def lora_modules(keys: Iterable[str], endings: tuple[str, str] = ENDINGS) -> list[str]:
    """Modules with both factors, in the order of the keys."""
    known = set(keys)
    modules = [key.removesuffix(endings[0]) for key in keys if key.endswith(endings[0])]
    return [name.removeprefix(PREFIX) for name in modules if name + endings[1] in known]


def to_tensors(name: str, A: Tensor, B: Tensor, inputs: Inputs) -> dict[str, Tensor]:
    """Factors (r, in) and (out, r) of a module as peft's LoRA names and shapes them."""
    endings = TOKEN_ENDINGS if isinstance(inputs, Tokens) else ENDINGS
    if isinstance(inputs, Patches):
        A, B = A.unflatten(1, (inputs.channels, *inputs.kernel)), B[:, :, None, None]
    return {PREFIX + name + endings[0]: A, PREFIX + name + endings[1]: B}


def from_tensors(name: str, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Inputs]:
    """The inverse. Of a convolution only the kernel is known."""
    if PREFIX + name + ENDINGS[0] not in state:
        A, B = (state[PREFIX + name + ending] for ending in TOKEN_ENDINGS)
        return A, B, Tokens(A.shape[1])
    A, B = (state[PREFIX + name + ending] for ending in ENDINGS)
    if A.dim() == 4 and B.dim() == 4:
        return A.flatten(1), B.flatten(1), Patches(A.shape[1], (A.shape[2], A.shape[3]))
    return A, B, VECTORS


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, by today's names.

    Raises: CheckpointError if it cannot be read, or has impossible ranks."""
    path = folder / CONFIG_NAME
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
        if found.get("peft_type") in ("LORA", "ADALORA"):
            check_values(found)
    except OSError as error:
        reason = error.strerror or error  # the path is named already
        raise CheckpointError(f"{path}: {reason}; give the folder of an adapter, or a run") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; give the folder of an adapter, or restore it from a copy") from error
    return translated(found)


def check_values(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a rank that is no int ≥ 1, or an alpha that is no number."""
    if config["peft_type"] == "ADALORA":
        ranks, alphas = [config.get("init_r")], [config.get("lora_alpha", 8)]
    else:
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(config.get(name) or {}, dict):
                raise ValueError(f"{name} is {config[name]!r}, not a table")
        ranks = [config.get("r", 8), *(config.get("rank_pattern") or {}).values()]
        alphas = [config.get("lora_alpha", 8), *(config.get("alpha_pattern") or {}).values()]
    for rank in ranks:
        if type(rank) is not int or rank < 1:
            raise ValueError(f"rank {rank!r}: expected an int of at least 1")
    for alpha in alphas:
        if type(alpha) not in (int, float):
            raise ValueError(f"alpha {alpha!r}: expected a number")


def read_shapes(folder: Path) -> tuple[dict[str, Shape], dict[str, str]]:
    """Shape of every tensor, and the file's metadata, without reading any weights. Raises CheckpointError."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: give the folder that `save_pretrained` wrote (safetensors only)")
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or truncated ({error}); restore it from a copy") from error
    strange = next((key for key in shapes if not key.isprintable()), None)
    if strange is not None:  # names are shown in terminals
        raise CheckpointError(f"{path}: the tensor name {strange!r} is not printable: the file is damaged or foreign")
    return shapes, metadata
