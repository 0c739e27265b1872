"""Newborn ranks: their learning rate equals a group of their own, and what happens at birth and at the end. T9, T10."""

import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.optim import Optimizer

from increlora import IncreLoraConfig, attach
from increlora.decide.schedules import Run, linear_clock, ramp_clock
from increlora.deltas import Status, TripletDelta
from increlora.methods import IncreLora
from increlora.methods.increlora_paper import IncreLoraPaper
from increlora.runtime import Controller
from increlora.runtime.births import PROPORTIONAL, BirthRates, created
from tests.reference.toy import gaussian_initial, toy_batches, toy_loss, toy_network

TOTAL, BORN = 40, 6
LETTERS = "AEB"
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "AdamW": partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1),
    "AdamW fused": partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1, fused=True),
    "AdamW amsgrad": partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1, amsgrad=True),
    "Adam": partial(torch.optim.Adam, lr=0.02, weight_decay=0.1),
    "SGD": partial(torch.optim.SGD, lr=0.05, weight_decay=0.1),
    "SGD momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
    "SGD nesterov": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.02, momentum=0.5, centered=True, weight_decay=0.1),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.05, lr_decay=0.01, weight_decay=0.1),
    "NAdam": partial(torch.optim.NAdam, lr=0.02, weight_decay=0.1, decoupled_weight_decay=True),
    "RAdam": partial(torch.optim.RAdam, lr=0.02, weight_decay=0.1),
    "Adamax": partial(torch.optim.Adamax, lr=0.02, weight_decay=0.1),
    "Adadelta": partial(torch.optim.Adadelta, lr=0.5, weight_decay=0.1),
}


def ramp(step: int, birth: int, run: Run) -> tuple[float, None]:
    return ramp_clock(step, birth, warmup=8), None


def published(step: int, birth: int, run: Run) -> tuple[float, float]:
    clock = partial(linear_clock, step, warmup=5, total=run.steps or 0)
    return clock(birth), clock(-1)


def two_blocks(dtype: torch.dtype = torch.float64) -> TripletDelta:
    """Block 0 from the start, block 1 of two ranks born after step BORN."""

    def normal(shape, generator, block):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    delta = TripletDelta(5, 3, [1, 2], init=dict.fromkeys(LETTERS, normal), scale=lambda rank: 1.0, dtype=dtype)
    delta.become(0, Status.ACTIVE)
    return delta


def gradients(delta: TripletDelta, step: int, blocks: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for i in range(blocks):
        for p in delta.block(i).values():
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def host_factor(step: int) -> float:
    return linear_clock(step + 1, -1, warmup=5, total=TOTAL + 1)


@pytest.mark.parametrize("clock", [ramp, published], ids=["ramp", "published"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_birth_rate_equals_a_group_of_its_own(name: str, clock) -> None:
    """Newborns in one group with everybody, their moves scaled, against newborns in a group with lr · m: ≤ 1e-14."""
    ours, twin = two_blocks(), two_blocks()
    optimizer = OPTIMIZERS[name](list(ours.parameters()))
    groups = [{"params": list(twin.block(i).values())} for i in range(2)]
    reference = OPTIMIZERS[name](groups)
    run = Run(TOTAL)
    births, peak = BirthRates(clock, run, optimizer), optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["initial_lr"] = peak  # as a scheduler would
    shares = []
    for step in range(TOTAL):
        born = step > BORN
        gradients(ours, step, 1 + born)
        gradients(twin, step, 1 + born)
        own, host = clock(step, BORN, run)
        rate = peak * host_factor(step)
        newborn_rate = own * rate if host is None else own * peak  # of the host's rate, or of its peak
        shares.append(newborn_rate / rate)
        optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = rate
        reference.param_groups[1]["lr"] = newborn_rate if born else rate
        births.remember([ours], step)
        optimizer.step()
        births.apply()
        reference.step()
        if step == BORN:
            ours.become(1, Status.ACTIVE, step)
    assert min(shares[BORN + 1 :]) < 0.2 and len({round(m, 6) for m in shares[BORN + 1 :]}) > 4
    for one, other in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)


def test_the_published_clock_names_the_schedule_it_was_made_for() -> None:
    clock = IncreLoraPaper.paper(2, warmup_steps=5, interval_steps=5).method(1, 8).clock
    assert clock is not None and clock(12, 10, Run(60)) == (0.2, pytest.approx(48 / 55))
    ramp_only = IncreLora(r=2, birth_warmup=4).method(1, 8).clock
    assert ramp_only is not None and ramp_only(12, 10, Run(60)) == (0.5, None)


def test_the_published_clock_is_absolute_whatever_the_hosts_schedule() -> None:
    """A scheduler notes the peak; a newborn follows its own linear curve to 0, also under a constant rate."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    births = BirthRates(published, Run(60), optimizer)
    assert births.factors(10, 12)[1] == pytest.approx(0.2 / (48 / 55))  # no scheduler: taken to be the published one
    optimizer.param_groups[0]["initial_lr"] = 0.5
    assert births.factors(10, 12) == (0.2, 0.2)
    assert births.factors(10, 59)[1] == pytest.approx(1 / 44)
    optimizer.param_groups[0]["lr"] = 0.125
    assert births.factors(10, 12)[1] == pytest.approx(0.2 * 0.5 / 0.125)
    optimizer.param_groups[0]["lr"] = 0.0
    assert births.factors(10, 12)[1] == 0.0


def test_every_optimizer_called_exact_is_tested() -> None:
    assert {name.split()[0] for name in OPTIMIZERS} == PROPORTIONAL


def test_factors_without_a_host_rate_do_not_move() -> None:
    births = BirthRates(published, Run(60), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0))
    assert births.factors(-1, 0) == (0.0, 1.0)  # the host's own
    assert births.factors(-1, 3) == (0.6, 1.0)
    assert births.factors(10, 10) == (1.0, pytest.approx(1 / (50 / 55)))
    assert births.factors(10, 12) == (0.2, pytest.approx(0.2 / (48 / 55)))
    assert births.factors(10, 60) == (0.0, 0.0)  # the host's rate is 0: nothing to scale


@pytest.mark.parametrize(("group", "multiplier"), [
    ({"lr": 0.3}, 0.2 / (48 / 55)),  # no scheduler: the host is taken to follow the published schedule
    ({"lr": 0.25, "initial_lr": 0.5}, 0.2 * 0.5 / 0.25),
    ({"lr": 0.0, "initial_lr": 0.5}, 0.0),
])  # fmt: skip
def test_every_group_has_its_own_schedule(group: dict, multiplier: float) -> None:
    """The peak learning rate is what a scheduler noted in the tensor's group."""
    one, other = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [one], "lr": 1.0, "initial_lr": 1.0}, {"params": [other], **group}])
    births = BirthRates(published, Run(60), optimizer)
    assert births.factors(10, 12, other) == (0.2, pytest.approx(multiplier))
    assert births.factors(10, 12, one) == births.factors(10, 12) == (0.2, pytest.approx(0.2))


def one_birth_step(dtype: torch.dtype, kind: type[Optimizer]) -> None:
    delta = two_blocks(dtype)
    delta.become(1, Status.ACTIVE, 0)
    optimizer = kind(list(delta.parameters()), lr=0.1)
    births = BirthRates(ramp, Run(TOTAL), optimizer)
    for step in (1, 2):
        gradients(delta, step, 2)
        births.remember([delta], step)
        optimizer.step()
        births.apply()


class Lion(torch.optim.SGD):
    """An optimizer whose update we know nothing about."""


@pytest.mark.parametrize(("dtype", "kind", "message"), [
    (torch.float32, Lion, "exact for .*AdamW.* not known for Lion"),
    (torch.bfloat16, torch.optim.SGD, "torch.bfloat16 lose the small moves"),
    (torch.float16, torch.optim.SGD, "torch.float16 lose the small moves"),
])  # fmt: skip
def test_inexact_birth_rates_are_announced_once(dtype, kind, message: str) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        one_birth_step(dtype, kind)
    assert len(caught) == 1


def test_exact_birth_rates_are_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_birth_step(torch.float32, torch.optim.SGD)


def test_when_a_tensor_was_created() -> None:
    delta = two_blocks()
    delta.assign(reserved=[-1, 4], born=[-1, 9], step=10)
    assert [created(delta, 1, letter) for letter in LETTERS] == [4, 9, 4]
    delta.reserve_learns = False
    assert [created(delta, 1, letter) for letter in LETTERS] == [9, 9, 9]
    assert [created(delta, 0, letter) for letter in LETTERS] == [-1, -1, -1]
    delta.reserve_learns = True
    delta.assign(reserved=[-1, -1])  # granted straight from dormant
    assert [created(delta, 1, letter) for letter in LETTERS] == [9, 9, 9]


# ---- a real model: the paper's preset on the toy network, from 6 ranks to 12; events at 10, 15, 20


class Toy:
    """A driven run, one step at a time."""

    def __init__(self, optimizer: Callable[..., Optimizer] = OPTIMIZERS["Adam"], **settings) -> None:
        config = IncreLoraConfig.paper(2, **{
            "total_ranks": 12, "top_h": 2, "grow_by": 1, "warmup_steps": 5, "interval_steps": 5,
            "target_modules": ["up", "down"],
        } | settings)  # fmt: skip
        self.model = get_peft_model(toy_network(), config)
        initial = gaussian_initial(3, std=0.3)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if ".lora_A" in name or ".lora_B" in name:
                    p.copy_(initial(name, 0, name[-2], tuple(p.shape)))
        self.optimizer = optimizer([p for p in self.model.parameters() if p.requires_grad])
        scheduler = partial(linear_clock, created=-1, warmup=5, total=60)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, scheduler)
        self.controller: Controller = attach(self.model, self.optimizer, total_steps=60, record=True)
        self.batches = iter(toy_batches(0, 60))

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            ((x, y),) = next(self.batches)
            toy_loss(self.model(x), y).backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()

    def blocks(self, *states: Status) -> list[tuple[TripletDelta, int, dict[str, nn.Parameter]]]:
        return [(d, i, d.block(i)) for d in self.controller.deltas for i in d.indices(*states)]  # type: ignore[misc]


def filled(e: Tensor, value: float) -> bool:
    return torch.equal(e.detach(), torch.full_like(e, value))


@pytest.mark.parametrize("k", [1, 2])
def test_t9_reserve_with_advance_learning(k: int) -> None:
    toy = Toy(grow_by=k, total_ranks=6 + 6 * k)
    assert not toy.blocks(Status.RESERVE)  # the first forward has none
    toy.step()
    assert [d.indices(Status.RESERVE) for d in toy.controller.deltas] == [[1]] * 6
    before = [{letter: p.detach().clone() for letter, p in b.items()} for _, _, b in toy.blocks(Status.RESERVE)]
    toy.step(3)
    for (delta, i, block), was in zip(toy.blocks(Status.RESERVE), before, strict=True):
        assert delta.sizes[i] == k and filled(block["E"], 1e-5)
        assert block["E"] not in toy.optimizer.state
        for letter in "AB":
            assert toy.optimizer.state[block[letter]] and not torch.equal(block[letter], was[letter])


def test_t9_activation_with_advance_learning() -> None:
    toy = Toy()
    toy.step(10)
    waiting = {id(b["E"]): (d, i, b) for d, i, b in toy.blocks(Status.RESERVE)}
    toy.step()  # step 10: the first event
    grown = [(d, i, b) for d, i, b in toy.blocks(Status.ACTIVE) if i > 0]
    assert len(grown) == 2 and sum(toy.controller.ranks.values()) == 8
    for delta, i, block in grown:
        assert id(block["E"]) in waiting and filled(block["E"], 1e-5)
        assert (delta.state.born[i], delta.state.reserved[i]) == (10, 0)
        assert delta.indices(Status.RESERVE) == [i + 1] and delta.state.reserved[i + 1] == 10
    toy.step(2)  # in step 11 the clock of a newborn e is still 0
    assert not any(filled(block["E"], 1e-5) for _, _, block in grown)
    assert all(filled(b["E"], 1e-5) for _, _, b in toy.blocks(Status.RESERVE))


def test_t9_without_advance_learning_all_three_enter_at_birth() -> None:
    toy = Toy(reserve="frozen")
    toy.step(10)
    names = {id(p): p.detach().clone() for _, _, b in toy.blocks(Status.RESERVE, Status.DORMANT) for p in b.values()}
    for _, _, block in toy.blocks(Status.RESERVE):
        assert filled(block["E"], 0.0) and not any(p in toy.optimizer.state for p in block.values())
    toy.step()
    grown = [b for _, i, b in toy.blocks(Status.ACTIVE) if i > 0]
    assert len(grown) == 2
    assert all(torch.equal(p, names[id(p)]) for b in grown for p in b.values())
    toy.step(3)
    assert all(p in toy.optimizer.state and not torch.equal(p, names[id(p)]) for b in grown for p in b.values())


def test_t10_finish() -> None:
    """At the budget: e of the reserve exactly 0, averages frozen, ΔW the active part alone, no further events."""
    toy = Toy(partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1))
    toy.step(20)
    assert sum(toy.controller.ranks.values()) == 10
    toy.step()  # step 20: the last event
    reserve = toy.blocks(Status.RESERVE)
    assert toy.controller.finished and len(reserve) == 6
    assert all(filled(block["E"], 0.0) for _, _, block in reserve)
    averages = toy.controller.rules[0].averages[:, 0].clone(), toy.controller.rules[0].averages[:, 1].clone()
    ranks, events = toy.controller.ranks, list(toy.controller.events)
    before = [block["A"].detach().clone() for _, _, block in reserve]
    toy.step(15)
    assert all(filled(block["E"], 0.0) for _, _, block in toy.blocks(Status.RESERVE))
    assert not any(torch.equal(b["A"], was) for (_, _, b), was in zip(reserve, before, strict=True))  # by the penalty
    assert torch.equal(toy.controller.rules[0].averages[:, 0], averages[0]) and averages[0].min() > 0
    assert torch.equal(toy.controller.rules[0].averages[:, 1], averages[1]) and averages[1].min() > 0
    assert (toy.controller.ranks, toy.controller.events) == (ranks, events)
    assert [r["modules"]["blocks.0.up"]["score"] is None for r in toy.controller.records[19:23]] == [
        False,
        False,
        True,
        True,
    ]
    for delta in toy.controller.deltas:
        whole = delta.weight().detach()
        delta.assign(status=[s if s == Status.ACTIVE else Status.DORMANT for s in delta.state.status])
        assert torch.equal(whole, delta.weight().detach())
        assert whole.abs().max() > 1e-6


def test_t10_finish_by_retiring() -> None:
    toy = Toy(finish="retire")
    toy.step(21)
    assert toy.controller.finished and not toy.blocks(Status.RESERVE)
    retired = toy.blocks(Status.RETIRED)
    assert len(retired) == 6
    assert [e.kind for e in toy.controller.events].count("finish") == 6
    before = [p.detach().clone() for _, _, b in retired for p in b.values()]
    toy.step(10)
    assert all(
        torch.equal(p, was) for p, was in zip((p for _, _, b in retired for p in b.values()), before, strict=True)
    )


def test_overshoot_never_finishes() -> None:
    """T6, published: 6 → 10 → 14 → 16 of 15; the reserve keeps its e."""
    toy = Toy(total_ranks=15, grow_by=2)
    toy.step(40)
    assert sum(toy.controller.ranks.values()) == 16
    assert [e.step for e in toy.controller.events if e.kind == "birth"] == [10, 10, 15, 15, 20]
    assert all(filled(block["E"], 1e-5) for _, _, block in toy.blocks(Status.RESERVE))
    assert not [e for e in toy.controller.events if e.kind == "finish"]


def test_the_importance_of_an_event_is_the_product_of_both_averages() -> None:
    toy = Toy()
    toy.step(11)
    record = toy.controller.records[10]["modules"]
    importance = {name: row["sensitivity"] * row["uncertainty"] for name, row in record.items()}
    births = [e for e in toy.controller.events if e.kind == "birth"]
    assert {e.module for e in births} == set(sorted(importance, key=importance.__getitem__)[-2:])
    assert [e.importance for e in births] == [importance[e.module] for e in births]
