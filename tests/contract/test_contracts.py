"""The contracts: every method of the catalogue and its variants run every contract. A new method needs no new test."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from increlora import (
    AdaLoraConfig,
    IncreLoraConfig,
    MoraConfig,
    SoraConfig,
    attach,
    rank_summary,
    registry,
)
from increlora.deltas import BlockDelta, Status
from increlora.errors import DriveError, ScheduleError
from increlora.hosts.peft import CONFIGS
from increlora.hosts.peft.layer import AdapterLayer
from tests import catalogue
from tests.catalogue import METHODS
from tests.hosts.tiny import Mlp, seeded
from tests.reference.attention import AttentionNet
from tests.switches import departing

STEPS = 16
TARGETS = ["up", "down", "head"]
MODULES = {"up": 20, "down": 20, "head": 11}  # parameters of one rank


@dataclass(frozen=True, eq=False)
class Row:
    """A method of the catalogue on a tiny net of 8 features in and 3 out, and what its page says about these options.

    Attributes:
        options: of a run of STEPS steps in which the whole budget is spent.
        jump: (rank before, after growth) → factor on the ΔW already learnt.
        exact: are as many ranks left as the budget says, or at most so many?
        at_most_lora: does `r` promise at most LoRA's parameters? (The published code counts ranks alone.)
    """

    name: str
    method: catalogue.Row
    make: Callable[..., Any]
    options: dict[str, Any]
    jump: Callable[[int, int], float] = lambda before, after: 1.0
    exact: bool = True
    at_most_lora: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def adaptive(self) -> bool:
        """Does it need an optimizer that it can follow?"""
        return self.method.adaptive or "restart_steps" in self.options

    @property
    def shares(self) -> dict[str, Any]:
        """Times as shares of a run of unknown length."""
        return dict(self.method.shares) if self.method.adaptive else {"total_steps": None} if self.adaptive else {}

    @property
    def targets(self) -> list[str]:
        return list(catalogue.ATTENTION) if self.method.attention else TARGETS

    def build(self, **changes: Any) -> PeftModel:
        chosen = {"target_modules": self.targets, "seed": 3} | self.options | changes
        return get_peft_model(self.bare(), departing(self.make, **chosen))

    def bare(self) -> nn.Module:
        return seeded(AttentionNet if self.method.attention else Mlp).double()


def row(name: str, make: Any = None, /, **options: Any) -> Row:
    """A row of the method that the name begins with: the catalogue's, or a variant with further options."""
    method = METHODS[name.partition(",")[0]]
    chosen = method.tiny("mlp", STEPS) | options
    about = {key: chosen.pop(key) for key in ("jump", "exact", "at_most_lora") if key in chosen}
    return Row(name, method, make or method.config_cls, chosen, **{"at_most_lora": "total_ranks" not in chosen} | about)


ADVANCE = {"reserve": "trained", "newborn": "published", "orthogonality": 0.1}  # as published
RESTARTS = {"restart_steps": 0.25, "restart_warmup": 2, "total_steps": STEPS}  # after steps 4, 8 and 12
FOLDED = {"r": 2, "dead_inputs": "fold"}


def published(rank: int) -> float:
    return rank + 1e-5


ROWS = [
    *map(row, METHODS),
    row("increlora, trained reserve", **ADVANCE),
    row("increlora, signed score", score="signed", **ADVANCE),
    row("increlora, exact accumulation", score_accumulation="exact", **ADVANCE),
    row("increlora, no reserve", reserve="none", newborn="published", orthogonality=0.1),
    row("increlora, frozen reserve", **ADVANCE | {"reserve": "frozen"}),
    row("increlora, reserve kept", finish="keep", **ADVANCE),
    row("increlora, parameters", total_parameters=130, **ADVANCE),
    row("increlora, total ranks", total_ranks=8),
    row("increlora, grow_by 3", r=4, grow_by=3, capacity=8),
    row("increlora, init_r 2", init_r=2),
    row("increlora, no penalty", **ADVANCE | {"orthogonality": 0.0}),
    row("increlora, paper", IncreLoraConfig.paper, grow_by=1, at_most_lora=False,
        jump=lambda before, after: published(before) / published(after)),
    row("adalora, after the step", observe="after_step"),
    row("adalora, penalty", orthogonality=0.1, start="published"),
    row("adalora, total ranks", total_ranks=4, init_r=6),
    row("adalora, nothing to prune", init_r=3),
    row("adalora, odd interval", interval_steps=3),
    row("adalora, paper", AdaLoraConfig.paper, lora_alpha=8, at_most_lora=False),
    row("sora, gates of 1", gate_init="ones", close_after=None),
    row("sora, total ranks", total_ranks=4, init_r=6, close_after=1),
    row("sora, penalty", gate_penalty=1.0),
    row("sora, threshold", threshold=0.04, close_after=2, exact=False),
    row("sora, threshold by rate", threshold=2.0, threshold_unit="learning_rate", levels=3, exact=False),
    row("sora, paper", SoraConfig.paper, lora_alpha=8, threshold=0.005, gate_penalty=0.1, exact=False),
    row("prilora, matrix", group="matrix"),
    row("prilora, zeros held", regrow=False, settle_steps=5),
    row("prilora, constant scale", scaling="constant", total_ranks=7, warmup_steps=4),
    row("prilora, rare statistic", statistic_interval=2, prune_share=0.3),
    row("lorta, as lora starts", init="lora_matched", alpha_pattern={"q_proj": 5}),
    row("melora, four minis", minis=4),
    row("mora, blocks", r=2, mora_type=2),
    row("mora, zero-padded", r=2, mora_type=4, pad="zero"),
    row("mora, truncation", operator="truncation"),
    row("mora, decoupling", operator="decoupling", **FOLDED),
    row("mora, rotation", operator="rotation", **FOLDED),
    row("mora, paper", MoraConfig.paper, r=2, mora_type=6, lora_dropout=0.0),
    row("mora, restarts", **RESTARTS),
    row("mora, restarts in a cycle", mora_type=3, restart_maps="cycle", **RESTARTS),
    row("mora, restarts of the same", **RESTARTS | {"restart_maps": "same", "restart_warmup": 0}),
    row("mora, restarts of rotation", operator="rotation", **FOLDED, **RESTARTS),
    row("lora_mini, composed", forward="composed", init="orthonormal"),
    row("lora_mini, sequential", forward="sequential"),
    row("lora_mini, frozen factors drawn again", save_projection=False),
    row("lora_mini, official auxiliaries", init="official_aux", save_projection=False),
    row("lora_mini, reduction", r=2, reduction=1, inner_in=None, inner_out=None),
]  # fmt: skip


def of(*ranks: str) -> pytest.MarkDecorator:
    """Every row whose ranks do this."""
    return each([row for row in ROWS if row.method.ranks in ranks])


def each(rows: list[Row]) -> pytest.MarkDecorator:
    """These rows; those beside a method's default are marked as variants."""
    marked = [pytest.param(row, id=row.name, marks=[pytest.mark.variant] * (row.name not in METHODS)) for row in rows]
    return pytest.mark.parametrize("row", marked)


every_row, growing_rows, pruned_rows = of("grow", "pruned", "fixed"), of("grow"), of("pruned")


def test_every_method_has_a_row_in_the_catalogue() -> None:
    assert list(METHODS) == list(registry.METHODS)
    assert {row.config_cls for row in METHODS.values()} == set(CONFIGS.values())


# -- what the contracts share --------------------------------------------------------------------------------------


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    return x, torch.randn(5, 3, generator=generator, dtype=torch.float64)


def optimizer_of(model: nn.Module, lr: float = 0.03) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)


def backward(model: nn.Module, step: int) -> None:
    x, y = batch(step)
    nn.functional.mse_loss(model(x), y).backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, start: int = 0, stop: int = STEPS) -> Iterator[int]:
    """One optimizer step per iteration."""
    for step in range(start, stop):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        yield step


def trained(row: Row, steps: int, **changes: Any) -> PeftModel:
    model = row.build(**changes)
    for _ in train(model, optimizer_of(model), stop=steps):
        pass
    return model


@cache
def finished(row: Row) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Ranks and state of a whole run; read only."""
    model = trained(row, STEPS)
    return ranks(model), {name: t.clone() for name, t in get_peft_model_state_dict(model).items()}


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(batch(99)[0])


def base_output(row: Row) -> Tensor:
    return output(row.bare())


def layers(model: nn.Module) -> dict[str, AdapterLayer]:
    return {n: m for n, m in model.named_modules() if isinstance(m, AdapterLayer)}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: layer.delta(layer.active_adapters[0]).weight().detach() for n, layer in layers(model).items()}


def ranks(model: nn.Module) -> dict[str, int]:
    return {m.module: m.active for m in rank_summary(model).modules}


def dormant(delta: BlockDelta) -> list[nn.Parameter]:
    """All of the blocks not yet needed, and the fixed e of the reserve."""
    waiting = [p for i in delta.indices(Status.DORMANT) for p in delta.block(i).values()]
    return waiting + [delta.block(i)["E"] for i in delta.indices(Status.RESERVE)]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> bool:
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


# -- the contracts -------------------------------------------------------------------------------------------------


@every_row
def test_the_function_is_the_base_model_at_the_start(row: Row) -> None:
    assert torch.equal(output(row.build()), base_output(row))


@every_row
def test_a_reserve_changes_the_function_by_no_more_than_its_scale(row: Row) -> None:
    model = row.build()
    for _ in train(model, optimizer_of(model, lr=0.0), stop=1):
        pass
    assert close(output(model), base_output(row), 1e-6)


@every_row
@pytest.mark.parametrize("steps", [5, STEPS])
def test_the_delta_of_the_identity_is_its_weight(row: Row, steps: int) -> None:
    for layer in layers(trained(row, steps)).values():
        delta = layer.delta("default")
        assert delta.weight().abs().max() > 1e-4
        assert close(delta(torch.eye(delta.in_features, dtype=torch.float64)), delta.weight().T)


@every_row
def test_a_reference_made_as_trainers_make_it_computes_the_same(row: Row) -> None:
    """TRL's DPO and GRPO add an adapter with the config of the trained one, and copy its parameters by name."""
    model = trained(row, steps=10)
    expected = output(model)
    model.add_adapter("ref", model.peft_config["default"])
    for name, p in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(p.data)
    assert rank_summary(model, "ref") == rank_summary(model, "default")
    model.set_adapter("ref")
    assert torch.equal(output(model), expected)
    model.set_adapter("default")
    assert torch.equal(output(model), expected)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".ref." in name)


@every_row
@pytest.mark.parametrize("steps", [5, STEPS])
def test_merging_keeps_the_function_and_unmerging_the_weights(row: Row, steps: int) -> None:
    model = trained(row, steps)
    expected, before = output(model), {n: p.clone() for n, p in model.named_parameters()}
    assert not close(expected, base_output(row), 1e-3)
    model.merge_adapter()
    assert close(output(model), expected)
    model.unmerge_adapter()
    assert torch.equal(output(model), expected)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert close(output(model.merge_and_unload()), expected)


@every_row
@pytest.mark.parametrize("steps", [5, STEPS])
def test_an_adapter_loads_under_another_name(row: Row, steps: int, tmp_path: Path) -> None:
    model = trained(row, steps)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(row.bare(), tmp_path, adapter_name="other")
    assert torch.equal(output(loaded), output(model))
    assert ranks(loaded) == ranks(model)


@growing_rows
def test_growth_keeps_what_was_learnt_up_to_the_stated_factor(row: Row) -> None:
    model = row.build()
    optimizer = optimizer_of(model)
    steps = train(model, optimizer)
    next(steps), next(steps)
    optimizer.param_groups[0]["lr"] = 0.0  # from here on only the controller can change anything
    next(steps)  # an optimizer may still place newborns; the event of step 2 is over, the one of step 4 is not
    next(steps)
    before, old = ranks(model), weights(model)
    next(steps)
    after, new = ranks(model), weights(model)
    assert after != before
    for name, layer in layers(model).items():
        module = layer.delta("default").name
        assert close(new[name], old[name] * row.jump(before[module], after[module]), 1e-6)  # 1e-5: e in reserve


@pruned_rows
def test_a_cut_takes_the_dropped_components_away_and_nothing_else(row: Row) -> None:
    model = row.build()
    optimizer = optimizer_of(model)
    steps = train(model, optimizer)
    next(steps), next(steps), next(steps), next(steps)
    optimizer.param_groups[0]["lr"] = 0.0
    deltas = {n: layer.delta("default") for n, layer in layers(model).items()}
    whole = {n: (components(delta), delta.block(0)["E"].detach().clone()) for n, delta in deltas.items()}
    for _ in range(4):
        next(steps)
    for name, delta in deltas.items():
        parts, e = whole[name]
        left = torch.where(e != 0, delta.block(0)["E"].detach() / e, 0.0)
        assert ((left == 0) | (left == 1)).all() or (row.method.shrinks and (left >= 0).all() and (left < 1).all())
        assert all(kept or share == 0 for kept, share in zip(delta.state.kept, left.flatten(), strict=True))
        assert close(delta.weight(), (torch.stack(parts) * left.unsqueeze(2)).sum(0))


def components(delta: BlockDelta) -> list[Tensor]:
    """ΔW of each rank alone, computed or not."""
    A, e, B = (p.detach() for p in delta.block(0).values())
    return [delta.scale * e[i] * torch.outer(B[:, i], A[i]) for i in range(len(e))]


@pruned_rows
@pytest.mark.parametrize("steps", [11, STEPS])
def test_what_was_dropped_stays_dropped_once_the_budget_has_settled(row: Row, steps: int) -> None:
    model = trained(row, steps)
    for layer in layers(model).values():
        delta = layer.delta("default")
        assert delta.state.settled
        assert [bool(e) for e in delta.block(0)["E"].flatten()] == list(delta.state.kept)


@pruned_rows
def test_the_budget_is_never_undercut_and_met_at_the_end(row: Row) -> None:
    model = row.build()
    summary = rank_summary(model)
    history = [summary.active]
    for _ in train(model, optimizer_of(model)):
        history.append(rank_summary(model).active)
    assert history[0] == summary.capacity and history[-1] <= summary.budget_ranks
    assert not row.exact or (history == sorted(history, reverse=True) and history[-1] == summary.budget_ranks)


@growing_rows
def test_the_budget_is_never_exceeded_and_met_at_the_end(row: Row) -> None:
    model = row.build()
    summary = rank_summary(model)
    ranks_allowed = summary.budget_ranks if summary.budget_ranks is not None else float("inf")
    parameters_allowed = summary.budget_parameters if summary.budget_parameters is not None else float("inf")
    history = [summary.active]
    for _ in train(model, optimizer_of(model)):
        summary = rank_summary(model)
        assert summary.active <= ranks_allowed
        assert summary.parameters <= parameters_allowed
        history.append(summary.active)
    assert history == sorted(history)
    left_over = parameters_allowed - summary.parameters
    met_in_parameters = left_over < row.options.get("grow_by", row.options["r"] // 2) * max(MODULES.values())
    assert summary.active == ranks_allowed or (summary.budget_ranks is None and met_in_parameters)


@every_row
def test_r_promises_at_most_the_parameters_of_lora(row: Row) -> None:
    model = trained(row, STEPS)
    summary, uniform = rank_summary(model), sum(m.in_features + m.out_features for m in layers(model).values())
    assert summary.parameters <= row.options["r"] * uniform or not row.at_most_lora
    assert summary.parameters >= uniform or summary.shared or row.method.lean


@every_row
@pytest.mark.parametrize("stop", [1, 5, 9, STEPS - 2])
def test_a_resumed_run_equals_a_straight_one_bitwise(row: Row, stop: int, tmp_path: Path) -> None:
    first = row.build()
    optimizer = optimizer_of(first)
    for _ in train(first, optimizer, stop=stop):
        pass
    first.save_pretrained(tmp_path)
    state = optimizer.state_dict()
    second = PeftModel.from_pretrained(row.bare(), tmp_path, is_trainable=True)
    optimizer = optimizer_of(second)
    optimizer.load_state_dict(state)
    for _ in train(second, optimizer, start=stop):
        pass
    straight_ranks, straight_state = finished(row)
    assert ranks(second) == straight_ranks
    assert same_tensors(get_peft_model_state_dict(second), straight_state)


@every_row
def test_a_pickled_copy_goes_on_where_the_model_was(row: Row) -> None:
    model = row.build()
    optimizer = optimizer_of(model)
    for _ in train(model, optimizer, stop=5):
        pass
    copied, state = pickle.loads(pickle.dumps(model)), pickle.loads(pickle.dumps(optimizer.state_dict()))
    assert torch.equal(output(copied), output(model)) and same_state(copied, model)
    with pytest.raises(DriveError, match="is a copy.*increlora.attach") if row.adaptive else nullcontext():
        backward(copied, 5)
    copied.zero_grad()
    second = optimizer_of(copied)
    second.load_state_dict(state)
    if row.adaptive:
        attach(copied, second)
    for each, its in ((model, optimizer), (copied, second)):
        for _ in train(each, its, start=5):
            pass
    assert same_state(copied, model)


def same_state(one: nn.Module, other: nn.Module) -> bool:
    """Are they equal in all that is worth saving, clocks and scores included?"""
    return same_tensors(get_peft_model_state_dict(one), get_peft_model_state_dict(other))


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@every_row
def test_the_order_of_target_modules_does_not_matter(row: Row) -> None:
    one, other = trained(row, STEPS), trained(row, STEPS, target_modules=list(row.targets[::-1]))
    expected = dict(one.named_parameters())
    assert ranks(one) == ranks(other)
    assert all(torch.equal(p, expected[name]) for name, p in other.named_parameters())


@growing_rows
def test_a_dormant_block_has_no_optimizer_state_and_does_not_move(row: Row) -> None:
    model = row.build()
    optimizer = optimizer_of(model)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in train(model, optimizer, stop=5):
        for layer in layers(model).values():
            assert all(p not in optimizer.state for p in dormant(layer.delta("default")))
    still = {id(p) for layer in layers(model).values() for p in dormant(layer.delta("default"))}
    assert still
    moved = {n for n, p in model.named_parameters() if p.requires_grad and not torch.equal(p, start[n])}
    assert moved
    assert not moved & {n for n, p in model.named_parameters() if id(p) in still}


@every_row
def test_training_that_nobody_drives_raises(row: Row) -> None:
    model = row.build()
    expected = (
        pytest.raises(DriveError, match="64 backward passes.*increlora.attach") if row.adaptive else nullcontext()
    )
    with expected:
        for step in range(70):
            backward(model, step)


@every_row
def test_shares_of_a_run_of_unknown_length_raise_at_the_first_step(row: Row) -> None:
    model = row.build(**row.shares)
    expected = pytest.raises(ScheduleError, match="total_steps") if row.adaptive else nullcontext()
    with expected:
        next(train(model, optimizer_of(model)))
