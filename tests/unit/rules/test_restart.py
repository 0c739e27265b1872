"""ReMoRA: what a restart does to rank, function, optimizer and learning rate (C11), and when it is due."""

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from increlora.decide.schedules import Multiples, Run
from increlora.errors import CheckpointError, ScheduleError
from increlora.methods import Site
from increlora.registry import METHODS
from increlora.runtime import Controller, register
from increlora.structural.mora.delta import SquareDelta
from increlora.structural.mora.maps import shuffled
from increlora.structural.mora.method import Mora

FAR = 1000


def delta_of(size: int, side: int, name: str = "layer", **options) -> SquareDelta:
    settings = Mora(side=side, restart_steps=FAR, restart_warmup=0, **options)
    return settings.method(1, 2 * size).make_delta(Site(name, size, size, 1, 2 * size, torch.float64))


def learn(delta: SquareDelta, seed: int) -> None:
    """Any values, as a round may leave them."""
    with torch.no_grad():
        delta.lora_M0.copy_(torch.randn(delta.side, delta.side, generator=torch.Generator().manual_seed(seed)))


def ranks(delta: SquareDelta, rounds: int) -> list[int]:
    """Rank of ΔW at the end of each round."""
    found = []
    for turn in range(rounds):
        learn(delta, turn)
        found.append(int(torch.linalg.matrix_rank(delta.weight())))
        delta.restart()
    return found


# ---- C11: how far the rank can grow

SIZES = [(16, 4), (64, 8)]


@pytest.mark.parametrize(("size", "side"), SIZES)
def test_c11_the_same_maps_give_no_more_than_one_round(size: int, side: int) -> None:
    assert ranks(delta_of(size, side, restart_maps="same"), 4) == [side] * 4


@pytest.mark.parametrize(("size", "side"), SIZES)
@pytest.mark.parametrize("maps", ["alternate", "cycle"])
def test_c11_the_published_types_reach_less_than_two_rounds_are_worth(size: int, side: int, maps: str) -> None:
    """Two ways to shorten and two to lengthen, which share the vector of ones: after 12 merges as after two."""
    found = ranks(delta_of(size, side, restart_maps=maps), 12)
    assert found[0] == side and found[1:] == [2 * side - 1] * 11


@pytest.mark.parametrize("operator", ["sharing", "truncation"])
def test_c11_permutations_add_almost_a_side_each_time(operator: str) -> None:
    found = ranks(delta_of(64, 8, operator=operator), 8)
    if operator == "sharing":
        assert found == [8 + turn * 7 for turn in range(8)] == [8, 15, 22, 29, 36, 43, 50, 57]
    assert all(later > earlier for earlier, later in itertools.pairwise(found))


@pytest.mark.parametrize("options", [
    *({"restart_maps": maps} for maps in ("permute", "cycle", "alternate", "same")), {"operator": "rotation"},
    {"operator": "decoupling"}, {"operator": "truncation"},
])  # fmt: skip
def test_c11_a_restart_changes_nothing_and_later_rounds_add_to_it(options: dict) -> None:
    delta, x = delta_of(14, 4, **options), torch.randn(5, 14, generator=torch.Generator().manual_seed(3)).double()
    parts = []
    for turn in range(5):
        learn(delta, turn)
        before, weight = delta(x), delta.weight()
        M = delta.lora_M0.detach().clone()
        delta.restart()
        torch.testing.assert_close(delta(x), before, rtol=1e-13, atol=1e-13)
        assert not delta.lora_M0.any() and torch.equal(delta.lora_past[turn], M)
        alone = delta_of(14, 4, **options)
        alone.maps = partial(lambda turn, _, *shape: delta.maps(turn, *shape), turn)
        with torch.no_grad():
            alone.lora_M0.copy_(M)
        parts.append(alone.weight())
        torch.testing.assert_close(weight, sum(parts), rtol=1e-12, atol=1e-12)
        A, B = delta.factors()
        torch.testing.assert_close(B @ A, weight, rtol=1e-12, atol=1e-12)


def test_c11_in_single_precision_the_function_stays_within_its_last_digits() -> None:
    delta = delta_of(64, 8).float()
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    for turn in range(4):
        learn(delta, turn)
        before = delta(x)
        delta.restart()
        torch.testing.assert_close(delta(x), before, rtol=1e-5, atol=1e-5)


def test_rounds_with_the_same_maps_are_computed_as_one() -> None:
    terms = {}
    for maps in ("same", "alternate", "cycle", "permute"):
        delta = delta_of(16, 4, restart_maps=maps)
        ranks(delta, 8)
        terms[maps] = len(delta._terms(delta.lora_M0))
    assert terms == {"same": 1, "alternate": 2, "cycle": 4, "permute": 9}


def test_the_past_is_not_trained_but_passed_through() -> None:
    delta = delta_of(16, 4)
    learn(delta, 0)
    delta.restart()
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    delta(x).sum().backward()
    torch.testing.assert_close(x.grad, delta.weight().sum(0).expand(3, -1), rtol=1e-12, atol=1e-12)
    assert x.grad.abs().max() > 0 and [n for n, _ in delta.named_parameters()] == ["lora_M0"]


def test_training_may_follow_inference() -> None:
    """Random orders are kept between calls."""
    shuffled.cache_clear()
    delta, x = delta_of(14, 4), torch.ones(2, 14, dtype=torch.float64, requires_grad=True)
    ranks(delta, 2)
    with torch.inference_mode():
        delta(x)
    delta(x).sum().backward()
    assert x.grad.abs().max() > 0 and delta.lora_M0.grad is not None


# ---- the run

STEPS = 13


class Net(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.settings = Mora(**{"side": 3, "restart_steps": 4, "restart_warmup": 0} | options)
        self.method = self.settings.method(2, 22)
        self.first = self.method.make_delta(Site("first", 6, 5, 2, 22, torch.float64))
        self.last = self.method.make_delta(Site("last", 5, 6, 2, 22, torch.float64))
        self.head = nn.Linear(6, 6).double()
        for p in self.head.parameters():
            nn.init.constant_(p, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x + self.last(torch.tanh(x[..., :5] + self.first(x)))))


def run(steps: int = STEPS, *, total: int | None = STEPS, make=AdamW, look=lambda *_: None, **options):
    """The network and its controller after so many steps; `look(step, network, optimizer)` after each."""
    net = Net(**options, total_steps=total)
    controller = Controller(net.method, {"first": net.first, "last": net.last})
    register(controller)
    optimizer = make(net.parameters(), lr=0.05)
    for step in range(steps):
        x = torch.randn(7, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        (net(x) - torch.sin(3 * x)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        look(step, net, optimizer)
    return net, controller


def test_restarts_come_when_they_are_due_and_are_noted() -> None:
    turns: list[int] = []
    _, controller = run(look=lambda step, net, _: turns.append(net.first.turns))
    assert turns == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3]
    events = [(e.step, e.kind, e.module, e.ranks, e.rank, e.importance) for e in controller.events]
    assert events == [(step, "restart", name, 0, 3, None) for step in (3, 7, 11) for name in ("first", "last")]


def test_the_moments_of_the_matrix_go_and_all_others_stay() -> None:
    """Trap: in fine-tuning mode the published code drops the whole optimizer's state."""
    seen: dict[int, tuple[bool, ...]] = {}

    def look(step: int, net: Net, optimizer) -> None:
        watched = net.first.lora_M0, net.last.lora_M0, net.head.weight
        seen[step] = tuple(p in optimizer.state for p in watched)
        if step == 4:  # bias correction starts anew, too
            assert [int(optimizer.state[p]["step"]) for p in watched] == [1, 1, 5]

    run(look=look)
    assert seen[3] == seen[7] == (False, False, True) and seen[4] == seen[6] == (True, True, True)


@pytest.mark.parametrize("interval", [4, 1])
def test_no_restart_after_the_last_step(interval: int) -> None:
    """Trap 17: where the interval divides the run, the published adapter is all zeros."""
    net, _ = run(12, total=12, restart_steps=interval)
    assert net.first.turns == 12 // interval - 1 and net.first.lora_M0.abs().max() > 1e-3


def test_in_a_run_of_unknown_length_nothing_is_lost_by_a_late_restart() -> None:
    net, _ = run(12, total=None)
    assert net.first.turns == 3 and not net.first.lora_M0.any() and net.first.weight().abs().max() > 1e-3


def test_the_learning_rate_rises_again() -> None:
    """SGD, so that moves are proportional: after a restart in step 3 the steps 4, 5, 6 move by 1/3, 2/3, 1."""
    moves: dict[int, list[float]] = {0: [], 3: []}
    for warmup, found in moves.items():
        before = [torch.zeros(3, 3)]

        def look(step: int, net: Net, optimizer, before=before, found=found) -> None:
            found.append(float((net.first.lora_M0.detach() - before[0]).norm()))
            before[0] = net.first.lora_M0.detach().clone()

        run(5, make=SGD, restart_warmup=warmup, look=look)
    assert moves[0][:3] == moves[3][:3]
    assert moves[3][4] == pytest.approx(moves[0][4] / 3)


def test_a_second_run_on_the_same_adapter_goes_on_with_its_past() -> None:
    net, controller = run()
    learnt = net.first.lora_past.clone()
    optimizer = AdamW(net.parameters(), lr=0.05)
    for step in range(5):
        x = torch.randn(7, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert net.first.turns == 4 and torch.equal(net.first.lora_past[:3], learnt) and net.first.state.born == (3,)


# ---- schedules and checkpoints


def test_the_schedule() -> None:
    def due(total: int | None, within: int = 20) -> list[int]:
        return [step for step in range(within) if schedule_of(total, restart_steps=4, restart_warmup=0).due(step)]

    assert due(16) == [3, 7, 11]
    assert due(None) == [3, 7, 11, 15, 19]
    assert due(5, within=7) == [3]
    share = schedule_of(100, restart_steps=0.25, restart_warmup=0.1)
    assert (share.interval, share.last, share.over(73), share.over(74)) == (25, 74, False, True)


def schedule_of(total: int | None, **options: float) -> Multiples:
    return Mora(**options).method(1, 8).rules[0].schedule(Run(total))


@pytest.mark.parametrize(("interval", "warmup", "total", "message"), [
    (16, 0, 16, "no restart falls into a run of 16 steps .restart_steps=16."),
    (10, 11, 16, "restart_warmup=11 is longer than a round of restart_steps=10"),
])  # fmt: skip
def test_a_schedule_that_does_not_fit_is_refused(interval: int, warmup: int, total: int, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        schedule_of(total, restart_steps=interval, restart_warmup=warmup)


def test_tensors_say_how_many_rounds_there_were() -> None:
    delta, other = delta_of(14, 4), delta_of(14, 6)
    ranks(delta, 3)
    learn(delta, 9)
    entries = {"lora_M0": delta.lora_M0.detach(), "lora_past": delta.lora_past, "lora_state": delta.lora_state}
    assert set(delta.entries()) - set(entries) == {"lora_statistics"}
    other.check(entries)
    other.fit(entries, keep_dormant=True)
    other.load_state_dict(entries, strict=True)
    assert torch.equal(other.weight(), delta.weight()) and other.side == 4
    fresh = {"lora_M0": torch.ones(6, 6), "lora_state": delta_of(14, 6).lora_state}
    other.fit(fresh, keep_dormant=False)
    assert other.lora_past is None and set(other.state_dict()) == {"lora_M0", "lora_state", "_extra_state"}


@pytest.mark.parametrize(("past", "M", "message"), [
    ((2, 4, 5), (4, 4), r"lora_past: expected \(2, 4, 4\), found \(2, 4, 5\)"),
    ((4, 4), (4, 4), r"lora_past: expected \(4, 4, 4\), found \(4, 4\)"),
    ((), (4, 4), r"lora_past: expected"),
    ((1, 4, 4), (4, 5), r"lora_M0: expected \(4, 4\), found \(4, 5\)"),
    ((1, 5, 5), (5, 5), "lora_M0: side 5 cannot be turned in pairs"),
    ((1, 60, 60), (60, 60), "lora_M0: side 60 needs more than twice the inputs"),
])  # fmt: skip
def test_a_past_that_does_not_fit_is_refused(past: tuple, M: tuple, message: str) -> None:
    delta = delta_of(14, 4, operator="rotation")
    found = {"lora_M0": torch.ones(M), "lora_past": torch.ones(past), "lora_state": delta.lora_state}
    with pytest.raises(CheckpointError, match=message):
        delta.check(found)


def test_plain_mora_needs_no_driving() -> None:
    assert not METHODS["mora"]().method(1, 8).adaptive and METHODS["mora"](restart_steps=5).method(1, 8).adaptive
