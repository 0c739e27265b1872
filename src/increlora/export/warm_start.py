"""A plain LoRA adapter as the starting point of one of ours: the same function, and training goes on from there."""

import itertools
import os
from collections.abc import Mapping

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..decide.allocation import Holding
from ..decide.feasibility import check_growth
from ..deltas import BlockDelta, LowRankDelta, Status, Tokens, TripletDelta
from ..errors import ConfigError, DriveError
from ..hosts.peft.layer import adapter_layers, chosen_adapter, handle_of
from .adapters import Adapter, read_adapter
from .lora_format import PREFIX

BASE_LAYER = ".base_layer."  # in a key: peft's mark of the weights below an adapter


@torch.no_grad()
def warm_start(
    model: nn.Module, source: nn.Module | str | os.PathLike[str], *, adapter_name: str | None = None
) -> None:
    """Give a fresh adapter of ours the function of another adapter; its first blocks take over the factors.

        blocks 0 … m, the fewest that hold the rank:  A, B as in the source (its scale over ours folded into B), e = 1

    A block that the source fills only in part keeps its own A and gets B = 0 for the rest (of an embedding it keeps B,
    and gets A = 0): it adds nothing yet, learns, and counts against the budget. Growth goes on from there, within the
    budget.

    Args:
        model: PeftModel or injected model with a fresh adapter of ours, not trained yet.
        source: what `export_lora` reads: an adapter's folder or model (LoRA, AdaLoRA, or one of ours).
        adapter_name: adapter of `model`; default the active one.
    Raises: ConfigError (modules of the source that the adapter does not have; ranks above `capacity` or `r`; base
        weights beside the factors that are not those here), BudgetError (the start is above the budget), DriveError
        (training has begun), CheckpointError, ExportError (source). The model is then unchanged.
    """
    name = chosen_adapter(model, adapter_name)
    handle = handle_of(model, name)
    deltas = fresh_deltas(model, name)
    given = read_adapter(source)
    check_shapes(given, deltas)
    counts = {n: blocks_for(n, delta, given.factors[n][0].shape[0] if n in given.factors else 0)
              for n, delta in deltas.items()}  # fmt: skip
    check_growth([holding(n, delta, counts[n]) for n, delta in deltas.items()], handle.budget)
    saved = saved_tensors(model, name, given)
    for n, delta in deltas.items():
        fill(delta, counts[n], given.factors.get(n))
    for tensor, value in saved:
        tensor.copy_(value)
    handle.describe()


def fresh_deltas(model: nn.Module, adapter: str) -> dict[str, BlockDelta]:
    """The deltas by module. Raises ConfigError if they cannot hold any low-rank ΔW, DriveError if they are trained."""
    deltas: dict[str, BlockDelta] = {}
    for name, layer in adapter_layers(model, adapter).items():
        delta = layer.delta(adapter)
        if not isinstance(delta, LowRankDelta | TripletDelta):
            kind = type(model.peft_config[adapter]).__name__  # type: ignore[index]
            raise ConfigError(f"{delta.name}: {kind} cannot hold a low-rank ΔW: train it from its own start")
        name = name.removeprefix(PREFIX)
        steps = delta.observer.step if delta.observer is not None else delta.steps
        if steps or delta.indices(Status.ACTIVE) != [0]:
            raise DriveError(f"{name} has been trained already: call warm_start on a fresh adapter, before training")
        deltas[name] = delta
    return deltas


def check_shapes(given: Adapter, deltas: Mapping[str, BlockDelta]) -> None:
    """Raise ConfigError unless every module of the source has its place here."""
    for name, (A, B) in given.factors.items():
        if name not in deltas:
            raise ConfigError(f"the source adapts {name}, this adapter does not: add it to `target_modules`")
        here, there = (deltas[name].in_features, deltas[name].out_features), (A.shape[1], B.shape[0])
        if here != there:
            raise ConfigError(f"{name} maps {here} (in, out), in the source {there}: it belongs to another model")


def blocks_for(name: str, delta: BlockDelta, rank: int) -> int:
    """How many of the first blocks hold this rank, at least one."""
    for count, total in enumerate(itertools.accumulate(delta.sizes), start=1):
        if total >= rank:
            return count
    raise ConfigError(
        f"{name}: the source has rank {rank}, this adapter has room for {sum(delta.sizes)}: raise `capacity` "
        f"(of PlainLoraConfig: `r`), or give an export of the source with max_rank={sum(delta.sizes)}"
    )


def holding(name: str, delta: BlockDelta, count: int) -> Holding:
    """What the module will hold with so many active blocks."""
    sizes = delta.sizes
    return Holding(name, sum(sizes[:count]), tuple(sizes[count:]), delta.in_features + delta.out_features)


def fill(delta: BlockDelta, count: int, pair: tuple[Tensor, Tensor] | None) -> None:
    """Make the first `count` blocks active and equal to B A together."""
    for i in range(count):
        delta.status[i] = Status.ACTIVE
    # The other one keeps its random start: with both at zero neither ever had a gradient.
    idle, done = "A" if isinstance(delta.inputs, Tokens) else "B", 0
    for i in range(count):
        block, end = delta.block(i), done + delta.sizes[i]
        block[idle].zero_()
        if "E" in block:
            block["E"].fill_(1)
        if pair is not None:
            A, B = pair[0][done:end], pair[1][:, done:end]
            block["A"][: len(A)] = A.to(block["A"])
            block["B"][:, : len(A)] = (B / delta.scale).to(block["B"])  # the scale of all active blocks
        done = end


def saved_tensors(model: nn.Module, adapter: str, given: Adapter) -> list[tuple[Tensor, Tensor]]:
    """(tensor here, its value in the source) for what the source holds beside factors: trained heads.

    peft also saves the base weights of adapted embeddings and heads; those that are here already need no copying."""
    modules = dict((model.get_base_model() if isinstance(model, PeftModel) else model).named_modules())
    here = {
        f"{name}.{key}": tensor
        for name, wrapper in modules.items()
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter in wrapper.modules_to_save
        for key, tensor in wrapper.modules_to_save[adapter].state_dict().items()
    }
    copies = []
    for key, value in given.others.items():
        if key in here and here[key].shape == value.shape:
            copies.append((here[key], value))
        elif not in_base(modules, key, value):
            raise ConfigError(f"the source also holds {key} of shape {tuple(value.shape)}, {remedy(key, here)}")
    return copies


def in_base(modules: Mapping[str, nn.Module], key: str, value: Tensor) -> bool:
    """Is this tensor of the source a weight that the base model here has, too?"""
    name, _, parameter = key.replace(BASE_LAYER, ".").rpartition(".")
    module = modules.get(name)
    module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    weight = getattr(module, parameter, None)
    return isinstance(weight, Tensor) and weight.shape == value.shape and torch.equal(value.to(weight), weight)


def remedy(key: str, here: Mapping[str, Tensor]) -> str:
    """What to do about a tensor of the source that has no place here."""
    if BASE_LAYER in key:
        return "the base model here has another one: load the base weights that the source was trained on"
    shape = tuple(here[key].shape) if key in here else "nothing"
    return f"here is {shape}: name its module in `modules_to_save`"
