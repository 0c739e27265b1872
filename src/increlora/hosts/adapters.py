"""What an adapter of ours amounts to, from a live model or from its folder: factors of each module, and the rest."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file
from torch import Tensor, nn

from ..deltas import BlockDelta
from ..errors import CheckpointError, ConfigError, ExportError
from ..methods import Method, Site
from .peft import checkpoint
from .peft.config import CONFIGS, check_folder
from .peft.drive import chosen_adapter
from .peft.layer import AdapterLayer
from .peft.model import adapter_layers

PREFIX = checkpoint.PREFIX


@dataclass(frozen=True)
class Adapter:
    """What an export needs to know, from a live model or from disk.

    Attributes:
        config: the native config.   factors: module → (A, B) with ΔW = B A, zero components left out.
        others: further tensors (`modules_to_save`) by module path.
        every: names of all modules of the base model, None where only the adapter is known.
    """

    config: Any
    factors: Mapping[str, tuple[Tensor, Tensor]]
    others: Mapping[str, Tensor]
    every: frozenset[str] | None


@torch.no_grad()
def from_model(model: nn.Module, adapter_name: str | None) -> Adapter:
    """The adapter of a live model. Raises ExportError if it has none of ours by that name."""
    try:
        name = chosen_adapter(model, adapter_name)
    except ConfigError as error:
        raise ExportError(f"nothing to export: {error}") from None
    layers = {n.removeprefix(PREFIX): layer for n, layer in adapter_layers(model, name).items()}
    config = model.peft_config[name]  # type: ignore[index]
    factors = {n: nonzero(*layer.delta(name).factors()) for n, layer in layers.items()}
    return Adapter(config, factors, others(get_peft_model_state_dict(model, adapter_name=name)), base_names(model))


@torch.no_grad()
def from_folder(path: Path) -> Adapter:
    """The adapter in a folder of ours; no model is built. Raises CheckpointError if it is damaged or foreign."""
    check_folder(path)
    weights = path / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        raise CheckpointError(f"{weights} is missing: give the folder that `save_pretrained` wrote")
    kind = json.loads((path / CONFIG_NAME).read_text()).get("peft_type")
    if kind not in CONFIGS:
        raise ExportError(f"{path} holds an adapter of type {kind}, expected one of {sorted(CONFIGS)}")
    config: Any = CONFIGS[kind].from_pretrained(str(path))  # type: ignore[attr-defined]
    state = load_file(weights)
    parts = checkpoint.split(state)
    if not parts:
        raise CheckpointError(f"{weights} holds no module of ours: give the folder that `save_pretrained` wrote")
    shapes = {name: features(name, found) for name, found in parts.items()}
    totals = len(shapes), sum(m + n for m, n in shapes.values())
    method = config.settings().method(*totals)
    factors = {
        name: nonzero(*rebuilt(method, Site(name, *shapes[name], *totals), found).factors())
        for name, found in parts.items()
    }
    return Adapter(config, factors, others(state), None)


def others(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a state dict holds beside our parameters, without peft's prefix."""
    ours = checkpoint.split(state)
    named = {key.removeprefix(PREFIX): value for key, value in state.items()}
    return {key: value for key, value in named.items() if key.rpartition(".")[0] not in ours}


def features(name: str, found: Mapping[str, Tensor]) -> tuple[int, int]:
    """(in, out) of a module, from its first block."""
    first = next(iter(checkpoint.present(found)), None)
    if first is None or f"lora_B{first}" not in found:
        raise CheckpointError(f"{name} has no complete block: the adapter file is incomplete or not increlora's")
    return found[f"lora_A{first}"].shape[1], found[f"lora_B{first}"].shape[0]


def rebuilt(method: Method, site: Site, found: Mapping[str, Tensor]) -> BlockDelta:
    """The delta of one module as the checkpoint left it: the one place that knows the scaling rules."""
    delta = method.make_delta(site)
    assert isinstance(delta, BlockDelta)
    checkpoint.check_blocks(site.name, delta, found)
    checkpoint.fit_delta(delta, found, keep_dormant=False)
    delta.load_state_dict({"_extra_state" if k == "lora_state" else k: v for k, v in found.items()}, assign=True)
    return delta


def nonzero(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """(A, B) without the components that add exactly nothing: those with a zero row in A or a zero column in B."""
    kept = (A != 0).any(dim=1) & (B != 0).any(dim=0)
    return A[kept].cpu(), B[:, kept].cpu()


def base_names(model: nn.Module) -> frozenset[str]:
    """Module names of the model as it was before any adapter."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    named = dict(base.named_modules())
    inside = tuple(f"{n}." for n, m in named.items() if isinstance(m, AdapterLayer | AuxiliaryTrainingWrapper))
    return frozenset(name for name in named if not name.startswith(inside))
