"""The states of all modules of an adapter, where they arrive together, whatever loads a model's state dict."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...deltas import BlockDelta, Status
from ...deltas.base import NAMES
from ...deltas.state import DAMAGED, STATE, STATISTICS, is_old
from ...errors import CheckpointError
from ...ops.parallel import is_sharded
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
        warn_of_averages(handle, found)


def warn_of_averages(handle: Handle, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Warn, before a run of this adapter is loaded, that what its rules remember is not among these entries: what is
    computed comes whole, but a run that goes on from it decides by other averages than the one that was saved."""
    if handle.start < (handle.method.budget.ranks or 0) <= ranks_in(handle, parts):  # it has grown, and decides no more
        return
    for name, part in parts.items():
        delta = handle.blocks[name]
        if not (sum(map(len, delta.statistics)) and STATE in part and STATISTICS not in part):
            continue
        state, _ = delta.given(part)
        if state.step and not state.settled and not is_old(part[STATE]):
            warnings.warn(
                f"{name}: {STATISTICS} was not saved with the parameters and buffers of step {state.step}: a run that "
                f"goes on from here begins its averages anew; save the whole `state_dict()`, or by `save_pretrained`",
                stacklevel=2,
            )
            return


def ranks_in(handle: Handle, parts: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Ranks of all modules that these entries are of."""
    there = ((delta, parts[name]) for name, delta in handle.blocks.items() if STATE in parts.get(name, ()))
    return sum(delta.given(part)[0].rank_of(delta.sizes_in(part)) for delta, part in there)


def check_dormant(handle: Handle) -> None:
    """Raise CheckpointError if a dormant block has been written into: somebody has copied the parameters of an adapter
    that had grown one by one, without the states of its blocks."""
    for name, delta in handle.blocks.items():
        if any(was_written(delta, block) for block in delta.indices(Status.DORMANT)):
            raise CheckpointError(
                f"{name}: parameters were written into a block that is dormant: copy the buffers of the model with its "
                f"parameters, or use `load_state_dict`"
            )


def was_written(delta: BlockDelta, block: int) -> bool:
    """Does it add anything, and is its last parameter (e, where there is one) not what it was made with?"""
    parameters = delta.block(block)
    if not parameters or any(p.is_meta or is_sharded(p) for p in parameters.values()):
        return False
    letter = "E" if "E" in parameters else [*parameters][-1]
    if not all(p.any() for p in parameters.values()):
        return False
    made = delta.draw(letter, block).to(parameters[letter])
    return not torch.allclose(parameters[letter], made, rtol=0.01, atol=0)  # as much as bfloat16 may have rounded


def check_together(handle: Handle, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise CheckpointError for entries of the modules of an adapter whose states it cannot have at one time."""
    blocks = {name: delta for name, delta in handle.blocks.items() if STATE in parts.get(name, ())}
    given = {name: delta.given(parts[name]) for name, delta in blocks.items()}
    for name, (_, statistics) in given.items():
        for rule, values in zip(handle.method.rules, statistics, strict=False):
            if getattr(rule, "nonnegative", False) and (values < 0).any():
                raise CheckpointError(f"{name}: averages of {type(rule).__name__} are negative: {DAMAGED}")
    states = {name: state for name, (state, _) in given.items()}
    steps = {state.step for state in states.values()}
    if len(steps) > 1:
        raise CheckpointError(f"the states of its modules are of steps {sorted(steps)}: they are of different runs")
    budget, settled = handle.method.budget, all(state.settled for state in states.values())
    if budget.ranks is None or not budget.exact:
        return
    total = ranks_in(handle, parts)
    if total > (budget.ranks if settled else max(budget.ranks, handle.start)):
        raise CheckpointError(
            f"its modules have {total} ranks, and this adapter a budget of {budget.ranks}: it was written by an "
            f"adapter of another `r`"
        )
