"""The states of all modules of an adapter, where they arrive together, whatever loads a model's state dict."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...deltas.base import NAMES, Status
from ...deltas.state import STATE
from ...errors import CheckpointError
from ...ops.parallel import local
from .handle import Handle
from .layer import adapters_of

MARK = ".lora_delta."
IGNORED = "_ddp_params_and_buffers_to_ignore"  # DistributedDataParallel reads it off the model that it wraps


def watch(model: nn.Module) -> None:
    """Have every state dict checked before anything of it is loaded, and keep our buffers out of DDP's broadcasts: they
    change with the steps, alike on every process, and reading what was broadcast would wait for the device."""
    if all(getattr(hook, "hook", None) is not check_arriving for hook in model._load_state_dict_pre_hooks.values()):
        model.register_load_state_dict_pre_hook(check_arriving)
    ours = [name for name, _ in model.named_buffers() if MARK in name]
    wrapped = [f"base_model.model.{name}" for name in ours]  # as a PeftModel names them
    setattr(model, IGNORED, [*dict.fromkeys([*getattr(model, IGNORED, ()), *ours, *wrapped])])


def check_arriving(model: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *rest: Any) -> None:
    """Raise CheckpointError if tensors of an adapter come without the states that they belong to, or with others."""
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, value in state_dict.items():
        module, mark, own = key.rpartition(MARK)
        adapter, _, entry = own.partition(".")
        if mark:
            parts.setdefault((module.removeprefix(prefix), adapter), {})[NAMES.get(entry, entry)] = value
    for adapter, handle in adapters_of(model).items() if parts else ():
        found = {name: parts[name, adapter] for name in handle.blocks if (name, adapter) in parts}
        for name, part in found.items():
            handle.blocks[name].arriving(part)
        check_together(handle, found)


def check_dormant(handle: Handle) -> None:
    """Raise CheckpointError if a dormant block adds anything: somebody has copied parameters here one by one, of an
    adapter that had grown, and without the states of its blocks."""
    if not getattr(handle.config, "init_lora_weights", True):  # all blocks begin at random
        return
    for name, delta in handle.blocks.items():
        for block in map(delta.block, delta.indices(Status.DORMANT)):
            if block and not any(p.is_meta for p in block.values()) and all(local(p).any() for p in block.values()):
                raise CheckpointError(
                    f"{name}: parameters were written into a block that is dormant: copy the buffers of the model with "
                    f"its parameters, or use `load_state_dict`"
                )


def check_together(handle: Handle, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise CheckpointError for entries of the modules of an adapter whose states it cannot have at one time."""
    blocks = {name: delta for name, delta in handle.blocks.items() if STATE in parts.get(name, ())}
    states = {name: delta.given(parts[name])[0] for name, delta in blocks.items()}
    steps = {state.step for state in states.values()}
    if len(steps) > 1:
        raise CheckpointError(f"the states of its modules are of steps {sorted(steps)}: they are of different runs")
    budget, settled = handle.method.budget, all(state.settled for state in states.values())
    if budget.ranks is None or not budget.exact:
        return
    total = sum(state.rank_of(blocks[name].sizes_in(parts[name])) for name, state in states.items())
    if total > (budget.ranks if settled else max(budget.ranks, handle.start)):
        raise CheckpointError(
            f"its modules have {total} ranks, and this adapter a budget of {budget.ranks}: it was written by an "
            f"adapter of another `r`"
        )
