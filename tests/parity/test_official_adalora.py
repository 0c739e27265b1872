"""`AdaLoraConfig.paper` against the naive twin of the published code: every step, every quirk, float64."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from increlora import AdaLoraConfig, attach, regularization_loss
from increlora.rules.keep import Keeper
from increlora.runtime import Controller
from tests.parity.test_official_increlora import set_initial
from tests.reference.official_adalora import OfficialConfig, Step, run_official
from tests.reference.toy import gaussian_initial, toy_batches, toy_loss, toy_network

Make = Callable[[Iterable[Tensor]], Optimizer]


def sgd(params):
    return SGD(list(params), lr=0.05, momentum=0.9)


def adamw(params):
    return AdamW(list(params), lr=1e-3, weight_decay=0.1)  # at 1e-2 the penalty's unsquared norm amplifies rounding


@dataclass(frozen=True)
class Case:
    name: str
    official: OfficialConfig
    make: Make = adamw
    accumulation: int = 1
    clip: float | None = None
    steps: int = 70


LONG = OfficialConfig(initial_warmup=20, final_warmup=60)
BASE = OfficialConfig(initial_warmup=8, final_warmup=20, mask_interval=4)
CASES = [
    Case("adamw", LONG, steps=210),
    Case("clipping, sgd, accumulation", LONG, sgd, accumulation=2, clip=0.05, steps=210),
    Case("sgd", BASE, sgd),
    Case("a cut at every step", replace(BASE, mask_interval=1)),
    Case("the last cut is late", replace(BASE, mask_interval=7, lora_r=5)),
    Case("no penalty", replace(BASE, gamma=0.0)),
    Case("squared penalty", replace(BASE, gamma=1e-3, orthogonality="squared")),
    Case("accumulation", BASE, accumulation=3),
    Case("clipping", BASE, clip=0.05),
    Case("other averages", replace(BASE, beta1=0.5, beta2=0.95)),
    Case("alpha 0 means r_init", replace(BASE, alpha=0.0, lora_r=3, target_rank=1)),
]


def ours(case: Case, initial) -> Iterator[tuple[float, Controller]]:
    official = case.official
    model = get_peft_model(toy_network(seed=0), AdaLoraConfig.paper(
        official.target_rank, init_r=official.lora_r, lora_alpha=official.alpha, target_modules=["up", "down"],
        warmup_steps=official.initial_warmup, settle_steps=official.final_warmup,
        interval_steps=official.mask_interval, beta=official.beta1, beta_uncertainty=official.beta2,
        orthogonality=official.gamma, orthogonality_form=official.orthogonality,
    ))  # fmt: skip
    set_initial(model, initial)
    optimizer = case.make(p for p in model.parameters() if p.requires_grad)
    controller = attach(model, optimizer, total_steps=case.steps)
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
        optimizer.zero_grad()
        yield total, controller


def close(ours: Tensor, theirs: Tensor) -> bool:
    """To 1e-10 of the tensor's largest entry."""
    return bool((ours - theirs).abs().max() <= 1e-10 * theirs.abs().max())


def statistics(controller: Controller, which: str) -> dict[str, Tensor]:
    assert isinstance(controller.rules[0], Keeper)
    names = [f"{name}.lora_{letter}" for name in controller.names for letter in "AEB"]
    return dict(zip(names, getattr(controller.rules[0], which), strict=True))


def check(t: int, controller: Controller, theirs: Step) -> None:
    for name, delta in zip(controller.names, controller.deltas, strict=True):
        if theirs.kept is not None:
            assert list(delta.state.kept) == list(theirs.kept[name]), (t, name)
            assert delta.rank == sum(theirs.kept[name])
        for letter, p in delta.block(0).items():
            assert close(p.detach(), theirs.tensors[f"{name}.lora_{letter}"]), (t, name, letter)
    for which, expected in (("sensitivity", theirs.I), ("uncertainty", theirs.U)):
        for name, found in statistics(controller, which).items():
            assert close(found, expected[name]), (t, name, which)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_paper_preset_is_the_published_code(case: Case) -> None:
    initial = gaussian_initial(seed=1, std=0.2)
    trace = run_official(case.official, case.make, initial=initial, steps=case.steps,
                         accumulation=case.accumulation, clip=case.clip)  # fmt: skip
    seen = set()
    for t, (theirs, (loss, controller)) in enumerate(zip(trace, ours(case, initial), strict=True)):
        assert abs(loss - theirs.loss) <= 1e-10 * abs(theirs.loss), t
        check(t, controller, theirs)
        seen.add(tuple(controller.ranks.values()))
    assert len(seen) > 3  # the ranks moved
    assert sum(controller.ranks.values()) == case.official.target_rank * len(controller.names)
    assert {event.kind for event in controller.events} >= {"retirement", "finish"}
