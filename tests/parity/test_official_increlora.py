"""`IncreLoraConfig.paper` against the naive twin of the published code: every step, every quirk, float64."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from increlora import IncreLoraConfig, attach, regularization_loss
from tests.reference.official_increlora import OfficialConfig, Trace, lr_factor, run_official
from tests.reference.toy import gaussian_initial, toy_batches, toy_loss, toy_network

STEPS = 60
Make = Callable[[Iterable[Tensor]], Optimizer]


def sgd(params):
    return SGD(list(params), lr=0.05, momentum=0.9)


def adamw(params):
    return AdamW(list(params), lr=1e-2, weight_decay=0.1)


@dataclass(frozen=True)
class Case:
    name: str
    official: OfficialConfig
    make: Make = adamw
    accumulation: int = 1
    clip: float | None = None
    steps: int = STEPS


BASE = OfficialConfig(target_rank=3, top_h=5, incre_rank_num=1)
CASES = [
    Case("adamw", BASE),
    Case("sgd", BASE, sgd),
    Case("no advance learning", replace(BASE, advance_learn=False)),
    Case("no advance learning, sgd", replace(BASE, advance_learn=False), sgd),
    Case("no regulariser", replace(BASE, gamma=0.0)),
    Case("squared regulariser", replace(BASE, gamma=1e-3, orthogonality="squared")),
    Case("overshoot", replace(BASE, target_rank=None, target_total=15, top_h=2, incre_rank_num=2)),
    Case("start at rank 2", replace(BASE, lora_r=2, target_rank=4, incre_rank_num=2, top_h=3)),
    Case("accumulation", BASE, accumulation=3),
    Case("clipping", BASE, clip=0.05),
    Case("clipping, sgd, accumulation", BASE, sgd, accumulation=2, clip=0.05),
    Case("no advance learning, clipping", replace(BASE, advance_learn=False), clip=0.05),
    Case("mean score", replace(BASE, score_norm="mean")),
    Case("late births", replace(BASE, top_h=1, init_warmup=40, interval=3, warmup_steps=7)),
    Case("alpha 0 means r0", replace(BASE, alpha=0.0)),
    Case("never reaches the budget", replace(BASE, top_h=1, interval=10, init_warmup=10)),
]


def run_ours(case: Case, initial) -> tuple[list, list[dict], object]:
    official = case.official
    model = get_peft_model(toy_network(seed=0), IncreLoraConfig.paper(
        official.target_rank or 2, total_ranks=official.target_total, init_r=official.lora_r,
        lora_alpha=official.alpha, top_h=official.top_h, grow_by=official.incre_rank_num,
        warmup_steps=official.init_warmup, interval_steps=official.interval, birth_warmup=official.warmup_steps,
        orthogonality=official.gamma, orthogonality_form=official.orthogonality, score_norm=official.score_norm,
        reserve="trained" if official.advance_learn else "frozen", target_modules=["up", "down"],
    ))  # fmt: skip
    set_initial(model, initial)
    optimizer = case.make(p for p in model.parameters() if p.requires_grad)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda g: lr_factor(-1, g, case.steps, official.warmup_steps)
    )
    controller = attach(model, optimizer, total_steps=case.steps, record=True)
    losses, norms = [], []
    for micro_batches in toy_batches(0, case.steps, case.accumulation):
        total = 0.0
        for i, (x, y) in enumerate(micro_batches):
            loss = toy_loss(model(x), y) / case.accumulation
            total += loss.item()
            if case.clip and official.gamma and i == 0:
                loss = loss + regularization_loss(model)
            loss.backward()
        if case.clip:
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], case.clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(total)
        norms.append({n: d.weight().norm().item() for n, d in zip(controller.names, controller.deltas, strict=True)})
    return losses, norms, controller


def set_initial(model, initial) -> None:
    """Initial values from outside, by parameter name, for every block there will ever be."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_delta." in name and ".lora_E" not in name:
                module, _, last = name.removeprefix("base_model.model.").partition(".lora_delta.default.lora_")
                p.copy_(initial(module, int(last[1:]), last[0], tuple(p.shape)))


def close(ours: float | None, theirs: float) -> bool:
    return ours is not None and abs(ours - theirs) <= 1e-10 * max(abs(theirs), 1e-30) + 1e-18


@pytest.mark.filterwarnings("ignore:the schedule")
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_paper_preset_is_the_published_code(case: Case) -> None:
    initial = gaussian_initial(seed=1, std=0.2)
    trace: Trace = run_official(case.official, case.make, initial=initial, steps=case.steps, seed=0,
                                accumulation=case.accumulation, clip_norm=case.clip)  # fmt: skip
    losses, norms, controller = run_ours(case, initial)
    target = trace.allocator.target_total
    grown_at_all = 0
    for g, (theirs, record) in enumerate(zip(trace.steps, controller.records, strict=True)):
        assert close(losses[g], theirs.task_loss), (g, losses[g], theirs.task_loss)
        growing = g == 0 or trace.steps[g - 1].total_rank < target
        for name, ours in record["modules"].items():
            where = (g, name)
            assert ours["rank"] == theirs.rank[name], where
            assert (ours["grown"] > 0) == (
                name in theirs.grown if not isinstance(theirs.grown, dict) else bool(theirs.grown[name])
            ), where
            if growing:
                assert close(ours["score"], theirs.score[name]), (where, ours["score"], theirs.score[name])
            assert close(ours["sensitivity"], theirs.I[name]), where
            assert close(ours["uncertainty"], theirs.U[name]), where
            assert close(ours["importance"], theirs.importance[name]), where
            assert close(norms[g][name], theirs.delta_norm[name]), (where, norms[g][name], theirs.delta_norm[name])
            grown_at_all += ours["grown"]
            for key, factor in theirs.lr_factor.items():
                module, _, tensor = key.rpartition(".")
                if module == name:
                    assert close(ours["lr_factor"].get(tensor, 1.0), factor), (
                        where,
                        key,
                        ours["lr_factor"].get(tensor),
                        factor,
                    )
    assert grown_at_all > 0
