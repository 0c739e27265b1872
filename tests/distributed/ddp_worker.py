"""One of two processes under DDP: every setting, then variants that are broken on purpose."""

import sys
from dataclasses import asdict
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from increlora import PlainLoraConfig
from increlora.errors import DriveError
from increlora.ops.parallel import mean_over_processes
from tests.distributed.launch import report
from tests.distributed.toy_run import batches_of, paper_config, run, same_everywhere, toy_model
from tests.reference.toy import toy_loss

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "find unused": {"find_unused_parameters": True},
    "bucket view": {"gradient_as_bucket_view": True},
    "no_sync": {},
    "static graph": {"static_graph": True},
    "paper, clipped": {},
}
ACCUMULATION = {"no_sync": 2}
CLIP = {"paper, clipped": 0.5}


def train(name: str, process: int, **settings: Any) -> dict[str, Any]:
    model = toy_model(paper_config()) if name in CLIP else toy_model(**settings)
    wrapped = DistributedDataParallel(model, **SETTINGS[name])
    batches = batches_of(process, accumulation=ACCUMULATION.get(name, 1))
    return asdict(run(model, batches, wrapped=wrapped, clip=CLIP.get(name)))


def poisoned(batches):
    """The batches with an infinite input in step 5."""
    x, y = batches[5][0]
    return [*batches[:5], [(x.clone().fill_(torch.inf), y)], *batches[6:]]


def with_a_poisoned_batch(process: int) -> dict[str, Any]:
    """The run in which the second process alone meets a batch that is not finite."""
    model, batches = toy_model(), batches_of(process)
    return asdict(run(model, poisoned(batches) if process else batches, wrapped=DistributedDataParallel(model)))


def averages(process: int) -> list[float]:
    """Means of scores where one process, or each of them, has none."""
    nan = float("nan")
    return mean_over_processes(torch.tensor([[1.0, 2.0, nan], [3.0, nan, nan]][process])).tolist()


def without_the_gate(process: int) -> str:
    """What DDP says where idle parameters take no part in the backward pass."""
    with patch("increlora.deltas.blocks.in_process_group", return_value=False):
        try:
            train("plain", process)
        except RuntimeError as error:
            return str(error)
    return ""


def with_own_scores(process: int) -> dict[str, Any]:
    """The run in which every process trusts its own scores."""
    with patch("increlora.rules.grow.mean_over_processes", side_effect=lambda scores: scores):
        return train("plain", process)


def join(process: int, settings: dict[str, Any], method: str = "increlora", **options: Any) -> dict[str, Any]:
    """A run under `join`, in which the second process has two batches more, or what is said instead of it."""
    model = toy_model(**settings) if method == "increlora" else toy_model(PlainLoraConfig(r=2, target_modules=["up"]))
    wrapped, steps, error = DistributedDataParallel(model), 0, ""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    try:
        with wrapped.join(**options):
            for [(x, y)] in batches_of(process)[: 4 + 2 * process]:
                toy_loss(wrapped(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
                steps += 1
    except (DriveError, RuntimeError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    return {"steps": steps, "error": error, "equal": same_everywhere(model)}


def main(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    process = dist.get_rank()
    found: dict[str, Any] = {name: train(name, process) for name in SETTINGS}
    found["signed"] = train("plain", process, score="signed")
    found["exact"] = train("plain", process, score_accumulation="exact")
    found["poisoned"] = with_a_poisoned_batch(process)
    found["averages"] = averages(process)
    found["own scores"] = with_own_scores(process)
    found["join"] = join(process, {})
    found["join, early end"] = join(process, {}, throw_on_early_termination=True)
    found["join, fixed ranks"] = join(process, {}, "lora")
    found["no gate"] = without_the_gate(process)
    report(folder, process, found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
