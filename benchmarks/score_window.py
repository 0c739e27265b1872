"""How many steps before an event must be scored? Of the modules that grow, the share that grows either way.

    .venv/bin/python benchmarks/score_window.py

IncreLoRA on stdlib-docs with MiniLM, every step scored; at every event the choice is made again from the scores of the
last W steps before each event alone, W = 1, 2, 4, …, and compared with the choice from all of them. The run itself goes
on with the latter, so nothing accumulates."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.utils.data import DataLoader

from increlora import attach
from increlora.decide.allocation import Holding, Plan
from increlora.decide.scores import smooth
from increlora.workbench.cli.build import build
from increlora.workbench.cli.settings import TrainSettings

WINDOWS = (1, 2, 4, 8, 16, 32)


def main(
    steps: Annotated[int, typer.Option(help="Length of the run.")] = 500,
    batch: Annotated[int, typer.Option(help="Examples a step.")] = 16,
    r: Annotated[int, typer.Option(help="Average rank at the end.")] = 8,
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, …")] = 1,
) -> None:
    """Train, decide again, and print the table."""
    found: dict[int, list[float]] = {window: [] for window in WINDOWS}
    for seed in range(seeds):
        scores, events, allocate = recorded(steps, batch, r, seed)
        whole = chosen(scores, events, allocate, window=steps)
        assert whole == [event.modules for event in events]
        for window, shares in found.items():
            again = chosen(scores, events, allocate, window=window)
            shares += [len(a & b) / len(a) for a, b in zip(whole, again, strict=True)]
    print(f"| steps scored before an event (of {steps // 33}) | equal choices |")
    print("| --- | --- |")
    for window, shares in found.items():
        print(f"| {window} | {sum(shares) / len(shares):.1%} |")


@dataclass(frozen=True)
class Decision:
    """An event: the step, what every module held, and which ones grew."""

    step: int
    holdings: Sequence[Holding]
    modules: set[int]


def recorded(steps: int, batch: int, r: int, seed: int) -> tuple[list[Tensor], list[Decision], Any]:
    """Scores (modules,) of every step until the budget is spent; every decision; and what decides."""
    options = {"score_window": None, "total_steps": steps}
    model, task = build(TrainSettings(method="increlora", task="stdlib-docs", r=r, seed=seed, options=options))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step / (0.06 * steps)) * (1 - step / steps)
    )
    controller = attach(model.train(), optimizer, record=True)
    grower: Any = controller.rules[0]
    allocate, decisions = grower.rule.allocate, []

    def noted(importance: Sequence[float], holdings: Sequence[Holding]) -> Plan:
        plan = allocate(importance, holdings)
        decisions.append(Decision(controller.step, holdings, {grant.module for grant in plan.grants}))
        return plan

    grower.rule = replace(grower.rule, allocate=noted)
    loader = DataLoader(task.train, batch, shuffle=True, collate_fn=task.collate)
    for inputs in chain.from_iterable(repeat(loader)):
        model(**inputs).loss.backward()
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        if controller.finished:
            break
    rows = [record["modules"].values() for record in controller.records]
    return [torch.tensor([module["score"] for module in row]) for row in rows], decisions, allocate


def chosen(scores: Sequence[Tensor], events: Sequence[Decision], allocate: Any, *, window: int) -> list[set[int]]:
    """Who grows at every event, if only the last `window` steps before each are scored."""
    sensitivity, uncertainty = torch.zeros_like(scores[0]), torch.zeros_like(scores[0])
    at, found = {event.step: event for event in events}, []
    for step, score in enumerate(scores):
        if any(0 <= event - step < window for event in at):
            sensitivity, uncertainty = smooth(sensitivity, uncertainty, score, beta=0.85, beta_uncertainty=0.85)
        if step in at:
            plan = allocate((sensitivity * uncertainty).tolist(), at[step].holdings)
            found.append({grant.module for grant in plan.grants})
    return found


if __name__ == "__main__":
    typer.run(main)
