"""An adapter that trains: its controller, and a config that always tells the current ranks."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ...deltas import BlockDelta, Delta, Status, Vectors
from ...deltas.inputs import as_json
from ...runtime import Controller, register
from .. import transformers as trainer_host
from .layer import SharedFactors, adapter_layers


def drive(model: nn.Module, adapter_name: str, config: Any, method: Any) -> Controller | None:
    """Give an adapter its controller; None where the method needs none."""
    trainer_host.install()
    deltas = {layer.delta(adapter_name).name: layer.delta(adapter_name)
              for layer in adapter_layers(model, adapter_name).values()}  # fmt: skip
    blocks, shared = blocks_of(deltas), shared_parameters(model, adapter_name)
    config.shapes = {name: [delta.in_features, delta.out_features] for name, delta in deltas.items()}
    config.inputs = {n: as_json(delta.inputs) for n, delta in deltas.items() if not isinstance(delta.inputs, Vectors)}

    def keep_config_current() -> None:
        config.ranks = {name: delta.rank for name, delta in deltas.items()}
        config.blocks = {name: [int(s) for s in delta.status] for name, delta in blocks.items()}
        config.parameters = shared + sum(delta.rank * delta.cost for delta in deltas.values())

    keep_config_current()
    if not method.adaptive:
        return None
    controller = Controller(method, blocks, on_change=keep_config_current)
    register(controller)
    return controller


def blocks_of(deltas: Mapping[str, Delta]) -> dict[str, BlockDelta]:
    """Those deltas that have blocks: of an adaptive method all."""
    return {name: delta for name, delta in deltas.items() if isinstance(delta, BlockDelta)}


def shared_parameters(model: nn.Module, adapter_name: str) -> int:
    """How many numbers the modules of an adapter share."""
    owners = [m for m in model.modules() if isinstance(m, SharedFactors) and adapter_name in m.lora_delta]
    return sum(p.numel() for owner in owners for p in owner.lora_delta[adapter_name].parameters())


def live_states(config: Any, name: str, delta: BlockDelta) -> list[Status] | None:
    """The block states in a live config; None if a change of its options (`dataclasses.replace`) made other blocks."""
    states = [Status(s) for s in config.blocks.get(name, ())]
    if len(states) != len(delta.sizes):
        return None
    rank = sum(size for size, state in zip(delta.sizes, states, strict=True) if state is Status.ACTIVE)
    return states if rank == config.ranks[name] else None
