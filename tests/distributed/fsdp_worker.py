"""One of two processes under FSDP2: every parameter sharded, checkpoints in mid-growth, a small Llama."""

import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from increlora.hosts.peft.layer import AdapterLayer
from increlora.ops.parallel import all_finite
from increlora.runtime import controllers_of
from tests.distributed.launch import report
from tests.distributed.llama import STEPS as LLAMA_STEPS
from tests.distributed.llama import adapted_llama, logits, tokens
from tests.distributed.toy_run import Log, adamw, batches_of, paper_config, run, toy_model, trainable

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "exact score": {"score_accumulation": "exact", "orthogonality": 0.0},
    "signed score": {"score": "signed", "orthogonality": 0.0},
    "no reserve": {"reserve": "none"},
    "paper, clipped": {"config": paper_config()},
}
CLIP = {"paper, clipped": 0.5}
SAVED = (5, 6)  # between two events, and right after one (newborn tensors have no optimizer state yet)
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def sharded(model: nn.Module) -> nn.Module:
    """One group of parameters per adapter layer, the rest at the root."""
    for module in model.modules():
        if isinstance(module, AdapterLayer):
            fully_shard(module)
    return fully_shard(model)


def train(name: str, process: int) -> dict[str, Any]:
    return asdict(run(sharded(toy_model(**CASES[name])), batches_of(process), clip=CLIP.get(name)))


def verdict(process: int) -> bool:
    """Is a sharded gradient finite whose second half alone is not? As this process hears it."""
    mesh = init_device_mesh("cpu", (2,))
    return bool(all_finite([distribute_tensor(torch.tensor([0.0, torch.inf]), mesh, [Shard(0)])]))


# -- torch's distributed checkpoint ------------------------------------------------------------------------------------


def straight_and_resumed(folder: str, process: int) -> dict[str, Any]:
    """The plain run with checkpoints on the way, and the runs that go on from them in a fresh model."""
    model = sharded(toy_model())
    owners: dict[int, list[str]] = {}

    def save(step, controller, optimizer) -> None:
        if step in SAVED:
            weights, moments = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=Path(folder, f"step{step}"))
            owners[step] = with_state(model, optimizer)

    straight = run(model, batches_of(process), on_step=save)
    resumed = {step: resume(Path(folder, f"step{step}"), process, step + 1) for step in SAVED}
    return {"straight": asdict(straight), "owners": owners, "resumed": resumed}


def resume(checkpoint: Path, process: int, first: int) -> dict[str, Any]:
    """Model state first: only then is it known which tensors may move, hence have an optimizer state to be loaded."""
    model = sharded(toy_model())
    optimizer = adamw(model)
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=checkpoint)
    set_model_state_dict(model, state["model"])
    controller = controllers_of(model)[0]
    before = controller.step, dict(controller.ranks), [float(values[0]) for values in controller.rules[0].statistics()]
    moments = {"optimizer": get_optimizer_state_dict(model, optimizer)}  # here torch steps once, with learning rate 0
    invented = with_state(model, optimizer)
    dcp.load(moments, checkpoint_id=checkpoint)
    # not strict: torch would insist on a state for every parameter with requires_grad
    set_optimizer_state_dict(model, optimizer, moments["optimizer"], options=StateDictOptions(strict=False))
    after = controller.step, dict(controller.ranks), [float(values[0]) for values in controller.rules[0].statistics()]
    found = {"before": before, "after": after, "driven": controller.driven, "invented": invented}
    found["owners"] = with_state(model, optimizer)
    return found | asdict(run(model, batches_of(process), optimizer=optimizer, first=first))


def with_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the tensors that own an optimizer state."""
    return sorted(name for name, p in trainable(model).items() if p in optimizer.state)


# -- a language model --------------------------------------------------------------------------------------------------


def llama_batches(process: int | None = None):
    """Per step one batch of four rows; with `process`, its two."""
    rows = slice(None) if process is None else slice(process, None, 2)
    return [[(batch[rows], batch[rows])] for batch in (tokens(4, seed=step) for step in range(LLAMA_STEPS))]


def train_llama(model: nn.Module, batches, **options: Any) -> Log:
    """By SGD, whose steps depend on gradients continuously: float32 noise stays noise."""
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.05, momentum=0.9)
    return run(model, batches, optimizer=optimizer, loss_of=lambda m, x, y: m(input_ids=x, labels=y).loss, **options)


def sharded_llama(process: int) -> dict[str, Any]:
    model = adapted_llama(total_steps=LLAMA_STEPS)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    log = train_llama(model, llama_batches(process))
    return asdict(log) | {"logits": logits(model), "state_dict": get_model_state_dict(model, options=WHOLE)}


def main(folder: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("error", module="increlora|tests|torch.distributed.fsdp")
    dist.init_process_group("gloo")
    process = dist.get_rank()
    found: dict[str, Any] = {name: train(name, process) for name in CASES}
    found["finite"] = verdict(process)
    found["checkpoint"] = straight_and_resumed(folder, process)
    found["llama"] = sharded_llama(process)
    report(folder, process, found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
