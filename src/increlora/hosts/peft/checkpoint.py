"""The checkpoint format, through peft's state-dict hooks: compact, and read by tensor shapes alone.

    <module>.lora_A0 …  parameters of active and reserve blocks      <module>.lora_state  see `deltas.state`

Dormant and retired blocks are not written. The tensors say everything: whatever loads a state dict resumes a run.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ...deltas import BlockDelta, Status
from ...deltas.state import STATE_FORMAT, unpack, without_idle_statistics
from ...errors import CheckpointError

PREFIX = "base_model.model."


def checkpoint_key(key: str, adapter_name: str) -> str:
    """`q.lora_delta.default.lora_A0` → `q.lora_A0`; `q.lora_delta.default._extra_state` → `q.lora_state`."""
    marker = f".lora_delta.{adapter_name}."
    if marker not in key:
        return key
    module, _, parameter = key.rpartition(marker)
    return f"{module}.{'lora_state' if parameter == '_extra_state' else parameter}"


def compact(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries worth saving: those of active and reserve blocks, and the states."""
    from .model import adapter_layers

    kept = dict(state_dict)
    for name, layer in adapter_layers(model, adapter_name).items():
        delta, place = layer.delta(adapter_name), f"{name}.lora_delta.{adapter_name}."
        for i in delta.indices(Status.DORMANT, Status.RETIRED):
            for letter in delta.letters:
                kept.pop(f"{place}lora_{letter}{i}", None)
        if f"{place}_extra_state" in kept:
            kept[f"{place}_extra_state"] = without_idle_statistics(kept[f"{place}_extra_state"])
    return kept


def fit(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor], *, trainable: bool) -> None:
    """Give every module the blocks that the checkpoint has.

    Raises: CheckpointError, before anything is changed, if the checkpoint is newer, incomplete, or of another model.
    """
    from .model import adapter_layers

    layers = adapter_layers(model, adapter_name)
    parts = split(state_dict)
    check_modules([name.removeprefix(PREFIX) for name in layers], parts)
    for name, layer in layers.items():
        check_blocks(name, layer.delta(adapter_name), parts[name.removeprefix(PREFIX)])
    for name, layer in layers.items():
        fit_delta(layer.delta(adapter_name), parts[name.removeprefix(PREFIX)], keep_dormant=trainable)


def fit_delta(delta: BlockDelta, found: Mapping[str, Tensor], *, keep_dormant: bool) -> None:
    sizes = {i: delta.size_of(found[f"lora_A{i}"]) for i in present(found)}
    delta.fit(sizes, len(states(found)), keep_dormant=keep_dormant)


def contents(weights: Path) -> dict[str, Tensor]:
    """What a weights file holds, without reading it all: block states, and the rest as tensors on the meta device."""
    with safe_open(weights, framework="pt") as file:
        return {
            key: file.get_tensor(key)
            if key.endswith(".lora_state")
            else torch.empty(file.get_slice(key).get_shape(), device="meta")
            for key in file.keys()  # noqa: SIM118
        }


def check_contents(
    found: Mapping[str, Tensor], deltas: Mapping[str, BlockDelta], model: nn.Module, modules_to_save: Sequence[str]
) -> None:
    """Raise CheckpointError if a file with these contents cannot be loaded into `model`, which is still untouched."""
    parts = split(found)
    check_modules(list(deltas), parts)
    for name, delta in deltas.items():
        check_blocks(name, delta, parts[name])
    others = {key.removeprefix(PREFIX): tuple(value.shape) for key, value in found.items()}
    for full_name, p in model.named_parameters():
        name = full_name.replace(".original_module.", ".")
        if ".modules_to_save." in name:
            continue  # another adapter's
        wanted = any(f".{module}." in f".{name}" for module in modules_to_save)
        if (wanted or name in others) and others.get(name) != (*p.shape,):
            there = others.get(name, "nothing")
            raise CheckpointError(
                f"{name}: expected {(*p.shape,)}, found {there}; the adapter is damaged or of another model"
            )


def split(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Our entries by module (without peft's prefix) and parameter."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state_dict.items():
        module, _, parameter = key.rpartition(".")
        if re.fullmatch(r"lora_(state|[A-Z]\d+)", parameter):
            parts.setdefault(module.removeprefix(PREFIX), {})[parameter] = value
    return parts


def check_modules(names: Sequence[str], parts: Mapping[str, object]) -> None:
    here = set(names)
    for name in sorted(here ^ set(parts)):
        where = "the checkpoint" if name in here else "the model"
        raise CheckpointError(
            f"module {name!r} is missing in {where}: the adapter belongs to another model or other `target_modules`"
        )


def check_blocks(name: str, delta: BlockDelta, found: Mapping[str, Tensor]) -> None:
    if "lora_state" not in found:
        raise CheckpointError(f"{name}.lora_state is missing: the adapter file is incomplete or not increlora's")
    version = int(found["lora_state"][0])
    if version > STATE_FORMAT:
        raise CheckpointError(
            f"{name}: written in format {version}, this version reads {STATE_FORMAT}; upgrade increlora"
        )
    try:
        state = unpack(found["lora_state"])
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{name}.lora_state ({error}): the adapter file is damaged") from error
    if delta.kept and not state.kept:
        raise CheckpointError(f"{name}.lora_state does not say which ranks count: it belongs to another method")
    for i, status in enumerate(states(found)):
        if status in (Status.ACTIVE, Status.RESERVE):
            for letter in delta.letters:
                check_tensor(name, delta, f"lora_{letter}{i}", letter, found)


def check_tensor(name: str, delta: BlockDelta, key: str, letter: str, found: Mapping[str, Tensor]) -> None:
    size = delta.size_of(found[key.replace(letter, "A")]) if key.replace(letter, "A") in found else 0
    shape = tuple(found[key].shape) if key in found else None
    if shape != delta.shape(letter, size):
        expected = delta.shape(letter, size) if size else "a tensor"
        raise CheckpointError(
            f"{name}.{key}: expected {expected}, found {shape or 'nothing'}; the adapter is damaged or of another model"
        )


def present(found: Mapping[str, Tensor]) -> list[int]:
    return sorted(int(key[6:]) for key in found if key.startswith("lora_A"))


def features(A: Tensor, B: Tensor) -> tuple[int, int]:
    """(in, out) of the module of a block, whatever structure its r ranks have: r (in + out) numbers in all."""
    return A.numel() // max(1, B.shape[1]), B.shape[0]


def states(found: Mapping[str, Tensor]) -> list[Status]:
    """Block states out of a module's state vector."""
    return [Status(v) for v in unpack(found["lora_state"]).status]


@torch.no_grad()
def complete(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add what the checkpoint leaves out, so that nothing is missing: unchanged, or freshly drawn if it lies on the
    meta device or has been trained since."""
    from .model import adapter_layers

    for name, layer in adapter_layers(model, adapter_name).items():
        delta = layer.delta(adapter_name)
        for i in range(len(delta.sizes)):
            trained = delta.status[i] != Status.DORMANT
            for letter, p in delta.block(i).items():
                key = f"{name}.lora_delta.{adapter_name}.lora_{letter}{i}"
                if key not in state_dict:
                    state_dict[key] = delta.draw(letter, i).to(p.dtype) if trained or p.is_meta else p.detach()
    return state_dict
