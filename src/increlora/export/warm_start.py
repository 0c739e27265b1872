"""A plain LoRA adapter as the starting point of one of ours: the same function, and training goes on from there."""

import itertools
import os

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..decide.allocation import Holding
from ..decide.feasibility import check_growth
from ..deltas import BlockDelta, LowRankDelta, Status, Tokens, TripletDelta
from ..errors import ConfigError, DriveError
from ..hosts.peft.handle import Handle
from ..hosts.peft.layer import adapted, adapter_of
from .adapters import Adapter, read_adapter

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
    name, handle = adapter_of(model, adapter_name)
    check_fresh(handle)
    deltas = handle.blocks
    given = read_adapter(source)
    for n in given.factors:
        if n not in deltas:
            raise ConfigError(f"the source adapts {n}, this adapter does not: add it to `target_modules`")
    counts = {n: blocks_for(n, delta, given.factors.get(n)) for n, delta in deltas.items()}
    held = [Holding(sum(d.sizes[: counts[n]]), tuple(d.sizes[counts[n] :]), d.cost) for n, d in deltas.items()]
    check_growth(held, handle.method.budget)
    saved = saved_tensors(adapted(model), name, given)
    for n, delta in deltas.items():
        fill(delta, counts[n], given.factors.get(n))
    for tensor, value in saved:
        tensor.copy_(value)
    handle.describe()


def check_fresh(handle: Handle) -> None:
    """Raise ConfigError if the deltas cannot hold any low-rank ΔW, DriveError if they are trained."""
    for name, delta in handle.deltas.items():
        if not isinstance(delta, LowRankDelta | TripletDelta):
            kind = type(handle.config).__name__
            raise ConfigError(f"{name}: {kind} cannot hold a low-rank ΔW: train it from its own start")
        if delta.steps or delta.indices(Status.ACTIVE) != [0]:
            raise DriveError(f"{name} has been trained already: call warm_start on a fresh adapter, before training")


def blocks_for(name: str, delta: BlockDelta, pair: tuple[Tensor, Tensor] | None) -> int:
    """How many of the first blocks hold (A, B), at least one. Raises ConfigError if they do not fit."""
    rank = 0
    if pair is not None:
        rank, here, there = len(pair[0]), (delta.in_features, delta.out_features), (pair[0].shape[1], len(pair[1]))
        if here != there:
            raise ConfigError(f"{name} maps {here} (in, out), in the source {there}: it belongs to another model")
    for count, total in enumerate(itertools.accumulate(delta.sizes), start=1):
        if total >= rank:
            return count
    raise ConfigError(
        f"{name}: the source has rank {rank}, this adapter has room for {sum(delta.sizes)}: raise `capacity` "
        f"(of PlainLoraConfig: `r`), or give an export of the source with max_rank={sum(delta.sizes)}"
    )


def fill(delta: BlockDelta, count: int, pair: tuple[Tensor, Tensor] | None) -> None:
    """Make the first `count` blocks active and equal to B A together."""
    delta.assign(status=[Status.ACTIVE] * count + [*delta.state.status[count:]])
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
    """(tensor here, its value in the source) for what the source holds beside factors: trained heads. peft also saves
    the base weights of adapted embeddings and heads; those that are here already need no copying."""
    state = (model.get_base_model() if isinstance(model, PeftModel) else model).state_dict()
    mark = f".modules_to_save.{adapter}."
    trained = {key.replace(mark, "."): tensor for key, tensor in state.items() if mark in key}
    base = {key.replace(BASE_LAYER, ".").replace(".original_module.", "."): tensor for key, tensor in state.items()}
    copies = []
    for key, value in given.others.items():
        here, below = trained.get(key), base.get(key.replace(BASE_LAYER, "."))
        if here is not None and here.shape == value.shape:
            copies.append((here, value))
        elif below is None or below.shape != value.shape or not torch.equal(value.to(below), below):
            remedy = f"here is {'nothing' if here is None else tuple(here.shape)}: name its module in `modules_to_save`"
            if BASE_LAYER in key:
                remedy = "the base model here has another one: load the base weights that the source was trained on"
            raise ConfigError(f"the source also holds {key} of shape {tuple(value.shape)}, {remedy}")
    return copies
