"""`SoraConfig.paper` against the naive twin of the published code: every step, every quirk, float64."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from torch.optim import SGD, AdamW

from increlora import SoraConfig, attach, regularization_loss
from increlora.runtime import Controller
from tests.reference.official_sora import HfAdamW, Make, OfficialConfig, Step, run_official
from tests.reference.toy import gaussian_initial, toy_batches, toy_loss, toy_network


def adamw(params, weight_decay: float) -> AdamW:
    return AdamW(list(params), lr=2e-3, weight_decay=weight_decay)


def published_adamw(params, weight_decay: float) -> HfAdamW:
    return HfAdamW(list(params), lr=2e-3, weight_decay=weight_decay)


def sgd(params, weight_decay: float) -> SGD:
    return SGD(list(params), lr=0.02, momentum=0.9, weight_decay=weight_decay)


@dataclass(frozen=True)
class Case:
    """`apart`: gates have a parameter group of their own, without decay; otherwise the library gives decay back."""

    name: str
    official: OfficialConfig
    make: Make = adamw
    apart: bool = False
    accumulation: int = 1
    clip: float | None = None
    steps: int = 80
    options: dict[str, Any] = field(default_factory=dict)


BASE = OfficialConfig(r=3, sparse_lambda=0.1, levels=((0, 2e-3),))
RISING = ((0, 0.0), (20, 1e-3), (50, 2e-3))
CASES = [
    Case("adamw", replace(BASE, levels=((0, 1.5e-3),)), steps=220),
    Case("the published optimizers", BASE, published_adamw, apart=True, steps=220),
    Case("sgd", BASE, sgd, apart=True),
    Case("no penalty", replace(BASE, sparse_lambda=0.0)),
    Case("accumulation", BASE, accumulation=3),
    Case("clipping", replace(BASE, sparse_lambda=1.0), clip=0.05),
    Case("a rising threshold", replace(BASE, levels=RISING),
         options={"levels": 2, "first_threshold": 0.0, "warmup_steps": 20}),
    Case("rank 8 of narrow modules", replace(BASE, r=8, alpha=8.0)),
]  # fmt: skip


def initial(name: str, block: int, letter: str, shape: tuple[int, int]) -> Tensor:
    std = {"A": 0.3, "B": 0.2, "E": 0.5}[letter]
    return gaussian_initial(seed=1, std=std)(name, block, letter, shape)


def ours(case: Case) -> Iterator[tuple[float, Controller]]:
    official = case.official
    model = get_peft_model(toy_network(seed=0), SoraConfig.paper(
        official.r, lora_alpha=official.alpha, threshold=official.levels[-1][1], target_modules=["up", "down"],
        gate_penalty=official.sparse_lambda, interval_steps=10, **case.options,
    ))  # fmt: skip
    entries = {n: p for n, p in model.named_parameters() if ".lora_delta." in n}
    with torch.no_grad():
        for name, p in entries.items():
            module, _, last = name.removeprefix("base_model.model.").partition(".lora_delta.default.lora_")
            p.copy_(initial(module, 0, last[0], tuple(p.shape)))
    gates = [p for n, p in entries.items() if n.endswith("E0")]
    optimizer = case.make(
        [p for n, p in entries.items() if not case.apart or not n.endswith("E0")], official.weight_decay
    )
    if case.apart:
        optimizer.add_param_group({"params": gates, "weight_decay": 0.0})
    controller = attach(model, optimizer, total_steps=case.steps)
    for micro_batches in toy_batches(0, case.steps, case.accumulation):
        total = 0.0
        for i, (x, y) in enumerate(micro_batches):
            loss = toy_loss(model(x), y) / case.accumulation
            total += loss.item()
            if case.clip and official.sparse_lambda and i == 0:
                loss = loss + regularization_loss(model)
            loss.backward()
        if case.clip:
            torch.nn.utils.clip_grad_norm_(list(entries.values()), case.clip)
        optimizer.step()
        optimizer.zero_grad()
        yield total, controller


def check(t: int, controller: Controller, theirs: Step) -> None:
    for name, delta in zip(controller.names, controller.deltas, strict=True):
        names = {"A": f"{name}.lora_A", "E": f"{name}.gate", "B": f"{name}.lora_B"}
        for letter, p in delta.block(0).items():
            expected = theirs.tensors[names[letter]]
            expected = expected.T if letter == "E" else expected
            assert (p - expected).abs().max() <= 1e-10 * max(float(expected.abs().max()), 1e-3), (t, name, letter)
            assert letter != "E" or torch.equal(p == 0, expected == 0), (t, name)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_paper_preset_is_the_published_code(case: Case) -> None:
    trace = run_official(
        case.official, case.make, initial=initial, steps=case.steps, accumulation=case.accumulation, clip=case.clip
    )
    for t, (theirs, (loss, controller)) in enumerate(zip(trace, ours(case), strict=True)):
        assert abs(loss - theirs.loss) <= 1e-10 * abs(theirs.loss), t
        check(t, controller, theirs)
    zeros = {
        name: int((d.block(0)["E"] == 0).sum()) for name, d in zip(controller.names, controller.deltas, strict=True)
    }
    assert {
        name: len(d.state.kept) - zeros[name] for name, d in zip(controller.names, controller.deltas, strict=True)
    } == (controller.ranks)
    assert 0 < sum(zeros.values()) < sum(len(d.state.kept) for d in controller.deltas)  # some went, some stayed
