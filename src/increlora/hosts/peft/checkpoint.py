"""The checkpoint format, through peft's state-dict hooks: compact, and read by tensor shapes alone.

    <module>.lora_A0 …  what the delta of a module says is worth writing (see `deltas.Stored`)
    <module>.lora_state, <module>.lora_statistics  what a resumed run needs beside it, see `deltas.state`
    shared_factors.lora_…  parameters that all modules share, where the method has such

A run resumes from these tensors alone, however they are loaded.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...deltas import Stored
from ...deltas.base import NAMES, check_shape
from ...errors import CheckpointError
from ...methods import Method
from ...patterns import shown
from .layer import AdapterLayer, TunerLayer

PREFIX = "base_model.model."
SMALL = (
    ".lora_state",
    ".lora_statistics",
    ".lora_digest",
)  # entries whose values are checked before loading, not their shapes alone
OURS = {entry: name for name, entry in NAMES.items()}  # on disk → in a state dict
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TYPES = FLOATS | {"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool}
FSDP1 = "_fsdp_wrapped_module."
BASE, SAVED, ORIGINAL = ".base_layer.", ".modules_to_save.", ".original_module."


def compact(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries worth saving."""
    found = dict(state_dict)
    for name, layer in model.named_modules():
        if isinstance(layer, TunerLayer) and adapter_name in layer.lora_delta:
            module: Any = layer.lora_delta[adapter_name]
            prefix = f"{name}.lora_delta.{adapter_name}.".replace(FSDP1, "")  # as in its state dicts
            own = {key: key.removeprefix(prefix) for key in found if key.startswith(prefix)}
            values = {NAMES.get(entry, entry): found.pop(key) for key, entry in own.items()}
            found |= {prefix + OURS.get(entry, entry): value for entry, value in module.saved(values).items()}
    return found


def fit(modules: Mapping[str, Stored], found: Mapping[str, Tensor], *, trainable: bool) -> dict[str, Tensor]:
    """Give every module the shapes that the checkpoint has, and return it with what it leaves out. Raises
    CheckpointError, before anything is changed, if the checkpoint is newer, incomplete, damaged, or of another model.
    """
    parts, whole = split(found), {key: value for key, value in found.items() if not is_ours(key)}
    check_parts(modules, parts)
    for key, value in found.items():
        check_finite(key, value)
    for name, module in modules.items():
        part = parts.get(name, {})
        module.fit(part, keep_dormant=trainable)
        whole |= {f"{PREFIX}{name}.{entry}": value for entry, value in {**part, **module.left_out(part)}.items()}
    return whole


def load(modules: Mapping[str, Stored], found: Mapping[str, Tensor]) -> None:
    """Give modules that live outside any model the values of a checkpoint, too. Raises as `fit`."""
    for name, part in split(fit(modules, found, trainable=False)).items():
        modules[name].load_state_dict({OURS.get(entry, entry): value for entry, value in part.items()}, assign=True)


# -- files -----------------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json as it is. Raises CheckpointError if it cannot be read."""
    return read_object(folder / CONFIG_NAME)


def read_object(path: Path) -> dict[str, Any]:
    """A file with one JSON object. Raises CheckpointError if it cannot be read."""
    try:
        if path.exists() and not path.is_file():  # a pipe would never end
            raise ValueError("not a file")
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error  # the path is named already
        remedy = "give the folder of an adapter, or a run, or restore the adapter folder from a copy"
        raise CheckpointError(f"{path}: {reason}; {remedy}") from error
    return found


@contextmanager
def opened(folder: Path) -> Iterator[Any]:
    """The weights file. Raises CheckpointError if there is none, or it cannot be read."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: give the folder that `save_pretrained` wrote (safetensors only)")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, RuntimeError, OverflowError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged or truncated ({error}); restore it from a copy") from error


def read_contents(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What the weights file holds, without reading it all (small entries, and the rest as tensors on the meta device,
    where types that no module computes with are bytes), and its metadata. Raises CheckpointError."""
    with opened(folder) as file:
        contents = {key: read_entry(file, key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    strange = next((key for key in contents if not key.isprintable()), None)
    if strange is not None:  # names are shown in terminals
        path = folder / SAFETENSORS_WEIGHTS_NAME
        raise CheckpointError(f"{path}: the tensor name {strange!r} is not printable: the file is damaged or foreign")
    return contents, metadata


def read_entry(file: Any, key: str) -> Tensor:
    if key.endswith(SMALL):
        found: Tensor = file.get_tensor(key)
        return found
    entry = file.get_slice(key)
    return torch.empty(entry.get_shape(), device="meta", dtype=TYPES.get(entry.get_dtype(), torch.uint8))


def check_values(folder: Path) -> None:
    """Raise CheckpointError if any number in the weights file is NaN or infinite. One tensor at a time is read."""
    with opened(folder) as file:
        for key in file.keys():  # noqa: SIM118
            check_finite(key, file.get_tensor(key))


def check_finite(name: str, value: Tensor) -> None:
    """Raise CheckpointError if there is a number that is NaN or infinite; states of modules are checked elsewhere."""
    if value.dtype in FLOATS.values() and not (value.is_meta or name.endswith(".lora_state") or value.isfinite().all()):
        raise CheckpointError(
            f"{name} holds NaN or infinite numbers: the run diverged or the file is damaged; take an earlier checkpoint"
        )


# -- what belongs into a model -----------------------------------------------------------------------------------------


def check_contents(
    found: Mapping[str, Tensor],
    modules: Mapping[str, Stored],
    model: nn.Module,
    saved: Collection[str],
    named: Collection[str],
) -> None:
    """Raise CheckpointError if a file with these contents cannot be loaded into `model`, which is unchanged so far.

    saved: the config's `modules_to_save`.   named: weights of the base model that the config says the file brings."""
    check_names(found)
    check_parts(modules, split(found))
    others = {plain(key): value for key, value in found.items() if not is_ours(key)}
    check_brought(found, [*saved, *brought_ends(model, modules, named)])
    own = {plain(name): value for name, value in model.state_dict().items() if SAVED not in name}
    for name, value in own.items():
        if name in others or (under(name, saved) and ".lora_" not in name):
            check_shape(name, tuple(value.shape), others)
    if unknown := others.keys() - own.keys():
        raise CheckpointError(f"{min(unknown)}: this model has no such weight: the adapter belongs to another model")


def check_names(keys: Iterable[str]) -> None:
    """Raise CheckpointError for names that peft would not find, or take for another adapter's, or for one twice."""
    seen: set[str] = set()
    for key in keys:
        if not key.startswith(PREFIX) or ".lora_delta." in key or plain(key) in seen:
            raise CheckpointError(f"{key}: expected {PREFIX}<module>.<entry>; the adapter file is damaged or foreign")
        seen.add(plain(key))


def check_brought(keys: Iterable[str], allowed: Collection[str]) -> None:
    """Raise CheckpointError for an entry that is not ours, nor in one of these modules."""
    for key in keys:
        if SAVED in key or ORIGINAL in key or not (is_ours(key) or under(plain(key), allowed)):
            raise overwriting(key)


def check_budget(said: Mapping[str, Any], method: Method) -> None:
    """Raise CheckpointError if a config says that its adapter was trained with another budget than it is loaded with,
    where the scale follows the budget; of methods that decide nothing, it follows the tensors."""
    was = said.get("budget")
    if not (method.adaptive and isinstance(was, dict)):
        return
    for unit in ("ranks", "parameters"):
        now = getattr(method.budget, unit)
        if unit in was and was[unit] != now:
            raise CheckpointError(
                f"the adapter was trained for {shown(was[unit])} {unit}, and its options make a budget of {now}: give "
                f"it the options of its run, or restore adapter_config.json from a copy"
            )


def check_others(keys: Iterable[str], model: nn.Module, adapter_name: str, *, biases: bool) -> None:
    """Raise CheckpointError for an entry that would replace a weight of the live model which is no part of this
    adapter. Embeddings and heads pass: which of them a file may bring is said by its config, see `check_contents`; so
    do `biases` in tensors that somebody hands over, as peft can train them."""
    brought = brought_ends(model, (), None)
    for key in keys:
        mine = f"{SAVED}{adapter_name}." in key or (under(plain(key), brought) and SAVED not in key)
        if not (is_ours(key) or mine or (biases and key.endswith(".bias"))):
            raise overwriting(key)


def overwriting(key: str) -> CheckpointError:
    return CheckpointError(
        f"{key} is no part of the adapter, and could replace a weight of the base model: if it was trained with "
        f"the adapter, name its module in `modules_to_save`, or an embedding or head of a resized vocabulary in "
        f"`base_weights` (in adapter_config.json); otherwise the file is damaged, or not to be trusted"
    )


def brought_ends(model: nn.Module, modules: Collection[str], named: Collection[str] | None) -> list[str]:
    """Names of input and output embeddings that an adapter may bring: those it adapts, which peft saves beside it, and
    those of which weights are named (None: all)."""
    ends = ends_of(model)
    names = [plain(name) for name, module in model.named_modules() if any(module is end for end in ends)]
    return [name for name in names if name in modules or named is None or any(under(key, [name]) for key in named)]


def is_ours(key: str) -> bool:
    return key.rpartition(".")[2].startswith("lora_")


def plain(key: str) -> str:
    """The name of a weight of the base model as it is without any adapter."""
    return key.removeprefix(PREFIX).replace(BASE, ".").replace(ORIGINAL, ".")


def under(name: str, modules: Collection[str]) -> bool:
    """Is this one of the modules, or something in it? As peft reads `modules_to_save`: by what their names end with."""
    return any(f"{module}." in f"{name}." for module in modules)


def split(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Our entries by module (without peft's prefix) and name."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state_dict.items():
        module, _, entry = key.rpartition(".")
        if entry.startswith("lora_"):
            parts.setdefault(module.removeprefix(PREFIX), {})[entry] = value
    return parts


def check_modules(modules: Mapping[str, Stored], parts: Iterable[str]) -> None:
    """Raise CheckpointError unless a checkpoint has parts of these modules and of no others."""
    expected = {n for n, module in modules.items() if any(True for _ in (*module.parameters(), *module.buffers()))}
    for name in sorted(expected ^ set(parts)):
        where = "the checkpoint" if name in expected else "the model"
        raise CheckpointError(
            f"module {name!r} is missing in {where}: the adapter belongs to another model or other `target_modules`"
        )


def check_sites(shapes: Any, deltas: Mapping[str, Stored]) -> None:
    """Raise CheckpointError if a config lists the `shapes` of other modules than these, of a method whose tensors name
    no module."""
    if isinstance(shapes, dict) and shapes and not any(d._parameters or d._buffers for d in deltas.values()):
        for name in sorted(shapes.keys() ^ deltas.keys()):
            here = "is adapted here, and was not" if name in deltas else "is not adapted here, and was"
            raise CheckpointError(f"module {name!r} {here} when the adapter was trained: restore its target options")


def check_parts(modules: Mapping[str, Stored], parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise CheckpointError unless the parts of a checkpoint are those of these modules."""
    check_modules(modules, parts)
    for name, part in parts.items():
        check_types(name, part)
        try:
            modules[name].check(part)
        except CheckpointError as error:
            raise CheckpointError(f"{name}.{error}") from error


def check_types(name: str, part: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless the entries of a module are floating-point numbers, its parameters of one type."""
    for entry, value in part.items():
        fits = value.dtype == torch.uint8 if entry == "lora_digest" else value.dtype in FLOATS.values()
        if not fits and entry != "lora_state":
            raise CheckpointError(f"{name}.{entry} cannot be numbers of type {value.dtype}: the adapter is damaged")
    types = {value.dtype for entry, value in part.items() if entry[5:6].isupper()}  # lora_A0, not lora_aux_A
    if len(types) > 1:
        raise CheckpointError(f"{name}: its tensors have several types ({sorted(map(str, types))}): it is damaged")


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
