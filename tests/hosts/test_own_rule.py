"""A rule that the library has never seen: it decides in a real run, resumes, and shows in the plan and the report."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from increlora import AdaLoraConfig, IncreLoraConfig, export_lora, rank_summary
from increlora.decide.allocation import Holding
from increlora.decide.budget import Budget
from increlora.decide.schedules import Run
from increlora.deltas import Status
from increlora.errors import CheckpointError, ConfigError
from increlora.hosts.peft.config import CONFIGS, type_name
from increlora.hosts.peft.register import register_method
from increlora.methods import AdaLora, IncreLora, Method
from increlora.registry import METHODS
from increlora.rules import Change, Expected, Forecast, Runner
from tests.hosts.tiny import Mlp, seeded
from tests.unit.workbench.test_cli import call, model, rows, train  # noqa: F401, a fixture

WHEN, STEPS = 3, 8


@dataclass(frozen=True)
class Swap:
    """At step 3 the first module loses a rank, and the last one gains one."""

    def check(self, holdings: Sequence[Holding], budget: Budget) -> None:
        pass

    def bind(self, deltas: Any, budget: Budget, slot: int) -> "Swapper":
        return Swapper(deltas, slot)


class Swapper(Runner):
    """Runner of `Swap`; it remembers how many steps it has seen."""

    def __init__(self, deltas: Any, slot: int) -> None:
        super().__init__(deltas, slot)
        self.reserve_statistics([1] * len(self.deltas))

    @property
    def done(self) -> bool:
        return bool(self.deltas[0].indices(Status.RETIRED))

    def forecast(self, holdings: Sequence[Holding], run: Run, first: int = 0) -> Forecast:
        ranks, parameters = sum(h.rank for h in holdings), sum(h.rank * h.cost for h in holdings)
        swapped = parameters - holdings[0].cost + holdings[-1].cost
        return Forecast((Expected(WHEN, 2, ranks, swapped),), tuple(holdings))

    def start(self, run: Run, first: int) -> None:
        pass

    def after_step(self, step: int) -> list[Change]:
        for values in self.statistics():
            values += 1
        if step != WHEN:
            return []
        self.deltas[0].become(0, Status.RETIRED)
        born = self.deltas[-1].free[0]
        self.deltas[-1].become(born, Status.ACTIVE, step)
        return [Change(0, -1), Change(len(self.deltas) - 1, 1)]


@dataclass(frozen=True)
class SwapLora(IncreLora):
    """IncreLoRA's blocks, and a rule of its own."""

    def method(self, sites: int, uniform_parameters: int) -> Method:
        return replace(super().method(sites, uniform_parameters), name="swap", rules=(Swap(),))


@pytest.fixture(scope="module")
def config() -> Iterator[Any]:
    yield register_method("swap", SwapLora)
    del METHODS["swap"], CONFIGS[type_name("swap")]


def adapted(config: Any, **options: Any) -> Any:
    chosen = options or {"r": 1, "grow_by": 1, "total_steps": STEPS}
    return get_peft_model(seeded(Mlp).double(), config(target_modules=["up", "down", "head"], **chosen))


def optimizer_of(adapter: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in adapter.parameters() if p.requires_grad], lr=0.03)


def steps(adapter: nn.Module, optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(5, 8, generator=generator, dtype=torch.float64)
        adapter(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def ranks(adapter: nn.Module) -> list[int]:
    return [module.active for module in rank_summary(adapter).modules]


@pytest.mark.parametrize("stop", [2, 3, 4, 6])
def test_it_drives_a_run_that_resumes_bitwise(config: Any, stop: int) -> None:
    straight, first, second = (adapted(config) for _ in range(3))
    steps(straight, optimizer_of(straight), 0, STEPS)
    assert ranks(straight) == [0, 1, 2]
    optimizer = optimizer_of(first)
    steps(first, optimizer, 0, stop)
    second.load_state_dict(first.state_dict())
    resumed = optimizer_of(second)
    resumed.load_state_dict(optimizer.state_dict())
    steps(second, resumed, stop, STEPS)
    found, expected = second.state_dict(), straight.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert [float(d.statistics[0]) for d in second.base_model.model.up.handles["default"].controller.deltas] == [8] * 3


def test_it_shows_in_the_plan_and_the_report(config: Any, model: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "run"
    options = ("--method", "swap", "--r", "1", "--set", "grow_by=1")
    planned = train(model, out, *options, "--dry-run")
    cells = [line.replace("│", " ").split() for line in planned.output.splitlines()]
    assert planned.exit_code == 0 and ["3", "2", "12"] in [row[:3] for row in cells], planned.output
    done = train(model, out, *options)
    assert done.exit_code == 0, done.output
    events = [(row["step"], row["kind"], row["ranks"]) for row in rows(out, "events.jsonl")]
    assert events == [(3, "retirement", -1), (3, "birth", 1)]
    assert json.loads((out / "run.json").read_text())["method"] == "swap"
    assert call("report", out).exit_code == 0 and "swap" in (out / "report.html").read_text()


def test_a_module_without_rank_is_saved_merged_and_exported(config: Any, tmp_path: Path) -> None:
    adapter = adapted(config)
    steps(adapter, optimizer_of(adapter), 0, STEPS)
    x = torch.randn(2, 8, dtype=torch.float64)
    expected = adapter(x).detach()
    adapter.save_pretrained(tmp_path / "native")
    export_lora(tmp_path / "native", tmp_path / "plain")
    for folder in ("native", "plain"):
        loaded = PeftModel.from_pretrained(seeded(Mlp).double(), tmp_path / folder)
        torch.testing.assert_close(loaded(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(adapter.merge_and_unload()(x), expected, rtol=1e-12, atol=1e-12)


def test_what_is_no_rule_is_refused_when_the_adapter_is_made(config: Any) -> None:
    with pytest.raises(ConfigError, match="there is a method 'swap' already"):
        register_method("swap", SwapLora)
    with pytest.raises(ConfigError, match="is no settings class: derive a frozen dataclass"):
        register_method("other", dict)  # type: ignore[arg-type]
    assert "other" not in METHODS

    class Stranger:
        check = Swap.check

    strange = replace(SwapLora(r=1).method(3, 51), rules=(Stranger(),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SwapLora, "method", lambda self, sites, parameters: strange)
        with pytest.raises(ConfigError, match=r"swap: .*Stranger.* is no rule"):
            adapted(config)


@pytest.mark.parametrize("name", ["increlora", "IncreLora"])
def test_a_name_that_is_taken_is_refused_and_leaves_our_methods_alone(name: str) -> None:
    methods, configs = dict(METHODS), dict(CONFIGS)
    with pytest.raises(ConfigError, match="choose another name"):
        register_method(name, SwapLora)
    assert methods == METHODS and configs == CONFIGS


def test_growth_refuses_statistics_of_another_rule() -> None:
    adapter = adapted(IncreLoraConfig)
    optimizer = optimizer_of(adapter)
    delta = adapter.base_model.model.up.handles["default"].blocks["up"]
    delta.statistics[0] = torch.zeros(5)
    with pytest.raises(CheckpointError, match="up: 5 statistics were loaded, 2 are needed"):
        steps(adapter, optimizer, 0, 1)


def test_a_rule_beside_one_that_is_done_keeps_its_statistics_in_files(tmp_path: Path) -> None:
    options = {"r": 2, "warmup_steps": 1, "interval_steps": 2, "settle_steps": 4, "total_steps": STEPS}
    with pytest.MonkeyPatch.context() as patch:
        alone = AdaLora.method
        patch.setattr(AdaLora, "method", lambda self, *totals: with_counter(alone(self, *totals)))
        adapter = adapted(AdaLoraConfig, **options)
        steps(adapter, optimizer_of(adapter), 0, STEPS)
        adapter.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(seeded(Mlp).double(), tmp_path, is_trainable=True)
        statistics = [delta.statistics for delta in loaded.base_model.model.up.handles["default"].blocks.values()]
    assert [float(counted) for _, counted in statistics] == [STEPS] * 3
    assert not any(averages.any() for averages, _ in statistics)  # those of AdaLoRA were left out


def test_a_rule_that_wants_what_nobody_shows_is_refused(config: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Swapper, "wants", frozenset({"outputs"}))
        with pytest.raises(ConfigError, match=r"wants \['outputs'\]: backward passes show gradients and inputs"):
            adapted(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SwapLora, "method", lambda self, *totals: replace(IncreLora.method(self, *totals), rules=(3,)))
        with pytest.raises(ConfigError, match="3 is no rule: it needs `check` and `bind`"):
            adapted(config)


def test_two_rules_that_prune_are_refused() -> None:
    with pytest.MonkeyPatch.context() as patch:
        alone = AdaLora.method
        twice = lambda self, *totals: replace(found := alone(self, *totals), rules=found.rules * 2)  # noqa: E731
        patch.setattr(AdaLora, "method", twice)
        with pytest.raises(ConfigError, match="adalora: one rule at most may prune"):
            adapted(AdaLoraConfig, r=2, warmup_steps=1, interval_steps=2, settle_steps=4, total_steps=STEPS)


def test_a_rule_that_fails_leaves_a_config_that_says_what_there_is(config: Any) -> None:
    adapter = adapted(config)
    optimizer = optimizer_of(adapter)
    with pytest.MonkeyPatch.context() as patch:
        act = Swapper.after_step

        def failing(self: Swapper, step: int) -> list[Change]:
            if act(self, step):
                raise RuntimeError("boom")
            return []

        patch.setattr(Swapper, "after_step", failing)
        with pytest.raises(RuntimeError, match="boom"):
            steps(adapter, optimizer, 0, STEPS)
    assert ranks(adapter) == [0, 1, 2] == list(adapter.peft_config["default"].ranks.values())


def with_counter(method: Method) -> Method:
    return replace(method, rules=(*method.rules, Count()))


@dataclass(frozen=True)
class Count:
    """Counts steps, and is never done."""

    def check(self, holdings: Sequence[Holding], budget: Budget) -> None:
        pass

    def bind(self, deltas: Any, budget: Budget, slot: int) -> "Counter":
        return Counter(deltas, slot)


class Counter(Runner):
    """Runner of `Count`."""

    def __init__(self, deltas: Any, slot: int) -> None:
        super().__init__(deltas, slot)
        self.reserve_statistics([1] * len(self.deltas))

    @property
    def done(self) -> bool:
        return False

    def start(self, run: Run, first: int) -> None:
        pass

    def after_step(self, step: int) -> list[Change]:
        for values in self.statistics():
            values += 1
        return []
