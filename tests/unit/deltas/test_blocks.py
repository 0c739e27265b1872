"""Deltas: states of blocks, and that dormant ranks do not move. T13."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from increlora import IncreLoraConfig, attach
from increlora.deltas import LowRankDelta, TripletDelta, blocks
from increlora.deltas.state import ModuleState, decimal
from increlora.methods import PlainLora, Site
from tests.switches import departing
from tests.unit.deltas.test_deltas import ACTIVE, DORMANT, KINDS, RESERVE, RETIRED, TRAINED, build, increlora

# ---- blocks


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_by_state(kind) -> None:
    delta = build(kind, [ACTIVE, RESERVE, DORMANT], sizes=(2, 1, 3))
    assert (delta.rank, delta.capacity, delta.live, delta.scale) == (2, 6, [0, 1], 1.0)
    assert delta.indices(RESERVE, DORMANT) == [1, 2]
    still = {id(p): n for n, p in delta.named_parameters() if any(p is q for q in delta.frozen_parameters())}
    expected = {f"lora_{letter}2" for letter in delta.letters}
    assert set(still.values()) == expected | ({"lora_E1"} if kind is TripletDelta else set())
    delta.reserve_learns = False
    assert delta.live == [0]
    assert len(delta.frozen_parameters()) == 2 * len(delta.letters)
    delta.become(2, RETIRED)
    assert delta.capacity == 3


def test_every_block_can_be_set_by_name() -> None:
    delta = increlora(capacity=4)
    names = [f"lora_{letter}{i}" for i in range(4) for letter in "AEB"]
    assert [n for n, _ in delta.named_parameters()] == names
    parameters = dict(delta.named_parameters())
    with torch.no_grad():
        for i, name in enumerate(names):
            parameters[name].fill_(i + 1.0)
    delta.assign(status=[ACTIVE] * 4)
    expected = 2.0 * sum((3 * i + 1) * (3 * i + 2) * (3 * i + 3) for i in range(4))
    torch.testing.assert_close(delta.weight().detach(), torch.full((3, 4), expected, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_extra_state_round_trip(kind) -> None:
    delta = build(kind, [ACTIVE, ACTIVE, RESERVE])
    delta.assign(born=[-1, 12, 20], reserved=[-1, 0, 12], step=21)
    copy = build(kind, [DORMANT, DORMANT, DORMANT], seed=1)
    missing = copy.load_state_dict(delta.state_dict())
    assert not missing.missing_keys and not missing.unexpected_keys
    assert copy.state == replace(delta.state, scale=pytest.approx(delta.state.scale))
    assert copy.steps == delta.steps
    assert torch.equal(copy.get_extra_state(), delta.get_extra_state())
    assert torch.equal(copy.weight(), delta.weight())
    numbers = [4, 21, 0, 0, *decimal(delta.scale), 3, 2, 2, 1, -1, 12, 20, -1, 0, 12, 0]
    assert delta.lora_state.tolist()[:-6] == [16 * number for number in numbers]
    assert delta.get_extra_state().tolist() == [0]


def test_blocks_unknown_to_a_checkpoint_stay_dormant() -> None:
    small, large = build(LowRankDelta, [ACTIVE, RESERVE]), build(LowRankDelta, [ACTIVE, ACTIVE, ACTIVE])
    small.assign(born=[-1, 4], reserved=[-1, 2], step=5)
    large.load_state_dict(small.state_dict(), strict=False)
    assert large.state.status == (ACTIVE, RESERVE, DORMANT)
    assert (large.state.born, large.state.reserved) == ((-1, 4, -1), (-1, 2, -1))


def checkpoint(sizes: dict[int, int], count: int) -> dict[str, Tensor]:
    """What a checkpoint with `count` blocks says of those in `sizes`."""
    state = ModuleState(0, (ACTIVE,) * count, (-1,) * count, (-1,) * count)
    return {"lora_state": state.pack()} | {f"lora_A{i}": torch.zeros(size, 5) for i, size in sizes.items()}


def test_fit_takes_the_blocks_of_a_checkpoint() -> None:
    delta = build(TripletDelta, [ACTIVE, DORMANT], sizes=(2, 1, 3))
    delta.fit(checkpoint({0: 2, 1: 3, 3: 1}, 4), keep_dormant=True)
    assert delta.sizes == [2, 3, 1, 1]
    assert [tuple(delta.block(1)[k].shape) for k in "AEB"] == [(3, 5), (3, 1), (3, 3)]
    assert delta.block(2) and all(p.dtype == torch.float64 for p in delta.parameters())
    delta.requires_grad_(False).fit(checkpoint({0: 2, 3: 1}, 5), keep_dormant=False)
    assert [bool(delta.block(i)) for i in range(5)] == [True, False, False, True, False]
    assert not any(p.requires_grad for p in delta.parameters())


# ---- dormant ranks do not move


def net(**settings) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    options = {"r": 2, "capacity": 5, "grow_by": 1, "top_h": 1, "warmup_steps": 3, "interval_steps": 3, "seed": 1}
    return get_peft_model(plain, departing(IncreLoraConfig, **options | settings, target_modules=["0", "2"]))


OPTIMIZERS = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1),
    "Adam": lambda ps: torch.optim.Adam(ps, lr=0.01, weight_decay=0.1),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01, momentum=0.9, weight_decay=0.1),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.01, weight_decay=0.1),
    "NAdam": lambda ps: torch.optim.NAdam(ps, lr=0.01, weight_decay=0.1),
    "RAdam": lambda ps: torch.optim.RAdam(ps, lr=0.01, weight_decay=0.1),
    "Adamax": lambda ps: torch.optim.Adamax(ps, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("gated", [False, True], ids=["one process", "through the zero gate"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_idle_ranks_do_not_move(name: str, gated: bool, monkeypatch) -> None:
    """With momentum, weight decay, a schedule and clipping; also where DDP gives idle blocks a gradient of zero."""
    monkeypatch.setattr(blocks, "in_process_group", lambda: gated)
    model = net()
    optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda g: 1 / (1 + 0.1 * g))
    controller = attach(model, optimizer, total_steps=20)
    first = {k: p.detach().clone() for k, p in model.named_parameters()}
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)
    for _ in range(12):
        model(x).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        for delta in controller.deltas:
            for p in (p for i in delta.indices(DORMANT) for p in delta.block(i).values()):
                assert p.grad is None
                assert not any(torch.as_tensor(v).any() for v in optimizer.state[p].values())  # Adagrad: zeros
    assert sum(controller.ranks.values()) == 4
    idle = [p for d in controller.deltas for i in d.indices(DORMANT, RETIRED) for p in d.block(i).values()]
    names = {id(p): k for k, p in model.named_parameters()}
    dormant = [p for d in controller.deltas for i in d.indices(DORMANT) for p in d.block(i).values()]
    assert len(dormant) >= 6 and len(idle) >= len(dormant)
    for p in dormant:
        assert torch.equal(p, first[names[id(p)]]), names[id(p)]
    active = [p for d in controller.deltas for i in d.indices(ACTIVE) for p in d.block(i).values()]
    assert not any(torch.equal(p, first[names[id(p)]]) for p in active)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_e_of_the_reserve_and_retired_blocks_do_not_move(name: str) -> None:
    model = net(**TRAINED, orthogonality=0.1)
    optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
    controller = attach(model, optimizer, total_steps=30)
    x, retired = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6), []
    for step in range(14):
        waiting = [(d, i, d.block(i)["A"].detach().clone()) for d in controller.deltas for i in d.indices(RESERVE)]
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        for delta, i, before in waiting:
            assert torch.equal(delta.block(i)["E"], torch.full((1, 1), 1e-5, dtype=torch.float64))
            moved = not torch.equal(delta.block(i)["A"], before)
            assert moved == (controller.births.factors(delta.state.reserved[i], step)[1] > 0)
        retired.append(
            [p.detach().clone() for d in controller.deltas for i in d.indices(RETIRED) for p in d.block(i).values()]
        )
    assert controller.finished and len(retired[-1]) >= 3
    later = [values for values in retired if values]
    for one, other in pairwise(later):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_zero_gate_changes_nothing(monkeypatch) -> None:
    """Its gradients are zeros, so neither clipping nor the active ranks notice it."""

    def train(gated: bool) -> list[Tensor]:
        monkeypatch.setattr(blocks, "in_process_group", lambda: gated)
        model = net()
        optimizer = OPTIMIZERS["AdamW"]([p for p in model.parameters() if p.requires_grad])
        controller = attach(model, optimizer, total_steps=20)
        x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)
        for _ in range(12):
            model(x).square().sum().backward()
            idle = [p for d in controller.deltas for i in d.indices(DORMANT) for p in d.block(i).values()]
            assert all((p.grad is not None) == gated for p in idle)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    torch.testing.assert_close(train(True), train(False), rtol=1e-12, atol=1e-14)


def test_merging_adds_what_the_forward_pass_adds() -> None:
    """In mid-growth, reserve included; unmerging takes it out again."""
    model = net(start="published", lora_alpha=64)
    optimizer = OPTIMIZERS["AdamW"]([p for p in model.parameters() if p.requires_grad])
    controller = attach(model, optimizer, total_steps=20)
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)
    with torch.no_grad():
        for delta in controller.deltas:
            delta.block(0)["E"].fill_(30.0)
            delta.block(1)["E"].fill_(20.0)
            delta.become(1, RESERVE)
    base_weights = {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer.weight" in n}
    before = model(x).detach()
    model.merge_adapter()
    torch.testing.assert_close(model(x).detach(), before, rtol=1e-12, atol=1e-12)
    moved = [(p - base_weights[n]).abs().max() for n, p in model.named_parameters() if n in base_weights]
    assert min(moved) > 1e-3
    model.unmerge_adapter()
    torch.testing.assert_close(model(x).detach(), before, rtol=1e-12, atol=1e-12)
    for name, p in model.named_parameters():
        if name in base_weights:
            torch.testing.assert_close(p.detach(), base_weights[name], rtol=1e-12, atol=1e-13)


def test_the_scale_of_lora() -> None:
    assert PlainLora(r=4, lora_alpha=6).method(1, 7).make_delta(Site("m", 8, 3, 1, 7)).scale == 1.5
