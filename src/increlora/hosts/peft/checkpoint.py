"""The checkpoint format, through peft's state-dict hooks: compact, and read by tensor shapes alone.

    <module>.lora_A0 …  what the delta of a module says is worth writing (see `deltas.Stored`)
    <module>.lora_state, <module>.lora_statistics  what a resumed run needs beside it, see `deltas.state`
    shared_factors.lora_…  parameters that all modules share, where the method has such

A run resumes from these tensors alone, however they are loaded.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...deltas import Stored
from ...deltas.base import NAMES, check_shape
from ...errors import CheckpointError
from .layer import AdapterLayer, TunerLayer

PREFIX = "base_model.model."
SMALL = (
    ".lora_state",
    ".lora_statistics",
    ".lora_digest",
)  # entries whose values are checked before loading, not their shapes alone
OURS = {entry: name for name, entry in NAMES.items()}  # on disk → in a state dict


def compact(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries worth saving."""
    found = dict(state_dict)
    for name, layer in model.named_modules():
        if isinstance(layer, TunerLayer) and adapter_name in layer.lora_delta:
            module: Any = layer.lora_delta[adapter_name]
            prefix = f"{name}.lora_delta.{adapter_name}."
            own = {key: key.removeprefix(prefix) for key in found if key.startswith(prefix)}
            values = {NAMES.get(entry, entry): found.pop(key) for key, entry in own.items()}
            found |= {prefix + OURS.get(entry, entry): value for entry, value in module.saved(values).items()}
    return found


def fit(modules: Mapping[str, Stored], found: Mapping[str, Tensor], *, trainable: bool) -> dict[str, Tensor]:
    """Give every module the shapes that the checkpoint has, and return it with what it leaves out. Raises
    CheckpointError, before anything is changed, if the checkpoint is newer, incomplete, or of another model."""
    parts, whole = split(found), dict(found)
    check_parts(modules, parts)
    for name, module in modules.items():
        part = parts.get(name, {})
        module.fit(part, keep_dormant=trainable)
        whole |= {f"{PREFIX}{name}.{entry}": value for entry, value in module.left_out(part).items()}
    return whole


def load(modules: Mapping[str, Stored], found: Mapping[str, Tensor]) -> None:
    """Give modules that live outside any model the values of a checkpoint, too. Raises as `fit`."""
    for name, part in split(fit(modules, found, trainable=False)).items():
        modules[name].load_state_dict({OURS.get(entry, entry): value for entry, value in part.items()}, assign=True)


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json as it is. Raises CheckpointError if it cannot be read."""
    path = folder / CONFIG_NAME
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error  # the path is named already
        remedy = "give the folder of an adapter, or a run, or restore the adapter folder from a copy"
        raise CheckpointError(f"{path}: {reason}; {remedy}") from error
    return found


def read_contents(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What the weights file holds, without reading it all (small entries, and the rest as tensors on the meta device),
    and its metadata. Raises CheckpointError."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: give the folder that `save_pretrained` wrote (safetensors only)")
    try:
        with safe_open(path, framework="pt") as file:
            contents = {
                key: file.get_tensor(key)
                if key.endswith(SMALL)
                else torch.empty(file.get_slice(key).get_shape(), device="meta")
                for key in file.keys()  # noqa: SIM118
            }
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or truncated ({error}); restore it from a copy") from error
    strange = next((key for key in contents if not key.isprintable()), None)
    if strange is not None:  # names are shown in terminals
        raise CheckpointError(f"{path}: the tensor name {strange!r} is not printable: the file is damaged or foreign")
    return contents, metadata


def check_contents(
    found: Mapping[str, Tensor], modules: Mapping[str, Stored], model: nn.Module, modules_to_save: Sequence[str]
) -> None:
    """Raise CheckpointError if a file with these contents cannot be loaded into `model`, which is unchanged so far."""
    check_parts(modules, split(found))
    others = {key.removeprefix(PREFIX): value for key, value in found.items()}
    for full_name, p in model.named_parameters():
        name = full_name.replace(".original_module.", ".")
        wanted = name in others or any(f".{module}." in f".{name}" for module in modules_to_save)
        if wanted and ".modules_to_save." not in name:  # another adapter's
            check_shape(name, tuple(p.shape), others)


def split(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Our entries by module (without peft's prefix) and name."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state_dict.items():
        module, _, entry = key.rpartition(".")
        if entry.startswith("lora_"):
            parts.setdefault(module.removeprefix(PREFIX), {})[entry] = value
    return parts


def check_parts(modules: Mapping[str, Stored], parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise CheckpointError unless the parts of a checkpoint are those of these modules."""
    expected = {name for name, module in modules.items() if module.entries()}
    for name in sorted(expected ^ set(parts)):
        where = "the checkpoint" if name in expected else "the model"
        raise CheckpointError(
            f"module {name!r} is missing in {where}: the adapter belongs to another model or other `target_modules`"
        )
    for name, part in parts.items():
        try:
            modules[name].check(part)
        except CheckpointError as error:
            raise CheckpointError(f"{name}.{error}") from error


def ends_of(model: nn.Module) -> list[nn.Module]:
    """Its input and output embeddings; many classes that have none raise an error instead of saying so."""
    ends = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(AttributeError, NotImplementedError):
            ends.append(getattr(model, name)())
    return [end for end in ends if end is not None]


def check_ends_unmerged(model: nn.Module) -> None:
    """Raise CheckpointError while the adapter of an input or output embedding is merged: peft saves that weight beside
    the adapter, whose ΔW would then be there twice."""
    for end in ends_of(model):
        if isinstance(end, AdapterLayer) and end.merged:
            name = end.delta(end.merged_adapters[0]).name
            raise CheckpointError(
                f"{name} is saved as it is, and an adapter is merged into it: call unmerge_adapter first"
            )
