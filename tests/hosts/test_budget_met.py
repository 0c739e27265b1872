"""A budget in ranks is met exactly in every run that has an event: short ones, and those whose modules fill up."""

import warnings

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from increlora import AdaLoraConfig, IncreLoraConfig, PriLoraConfig, SoraConfig, attach, rank_summary
from increlora.errors import ScheduleError


def adapted(config):
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return get_peft_model(LlamaForCausalLM(llama), config)


def train(model, steps: int):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    controller = attach(model, optimizer, total_steps=steps)
    forecast = controller.forecast(steps)
    tokens = torch.arange(16).reshape(2, 8)
    for _ in range(steps):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return controller, forecast


@pytest.mark.parametrize("steps", [2, 3, 5, 11, 12, 13, 20])
def test_growth_meets_its_budget_in_short_runs_by_default(steps: int) -> None:
    model = adapted(IncreLoraConfig(r=8, target_modules="all-linear"))
    controller, forecast = train(model, steps)
    assert controller.finished and rank_summary(model).active == 8 * 14
    assert forecast.events[-1].ranks == sum(h.rank for h in forecast.holdings) == 8 * 14
    assert rank_summary(model).parameters <= 8 * sum(m.cost for m in rank_summary(model).modules)


@pytest.mark.parametrize("config_cls", [AdaLoraConfig, SoraConfig, PriLoraConfig])
@pytest.mark.parametrize("steps", [2, 3, 13])
def test_pruning_meets_its_budget_in_short_runs_by_default(config_cls, steps: int) -> None:
    model = adapted(config_cls(r=4, target_modules="all-linear"))
    controller, _ = train(model, steps)
    assert controller.finished and rank_summary(model).active == 4 * 14


def test_full_modules_and_small_blocks_are_made_up_for() -> None:
    """14 modules of capacity 5, 4 ranks a grant: 3 modules an event and 6 events are enough for 70 ranks on paper."""
    options = {"r": 5, "capacity": 5, "grow_by": 4, "top_h": 3, "warmup_steps": 1, "interval_steps": 2}
    model = adapted(IncreLoraConfig(target_modules="all-linear", total_ranks=14 * 5, **options))
    controller, forecast = train(model, 14)
    assert controller.finished and set(controller.ranks.values()) == {5}
    assert sum(h.rank for h in forecast.holdings) == 70
    assert len({event.step for event in controller.events if event.kind == "birth"}) <= 6


def test_a_schedule_that_leaves_enough_is_left_alone() -> None:
    model = adapted(IncreLoraConfig(r=4, target_modules="all-linear", warmup_steps=1, interval_steps=2, top_h=3))
    controller, _ = train(model, 60)
    births: dict[int, int] = {}
    for event in controller.events:
        births[event.step] = births.get(event.step, 0) + (event.kind == "birth")
    assert rank_summary(model).active == 56 and max(births.values()) == 3


def test_a_schedule_of_ones_own_that_is_too_short_is_refused_as_before() -> None:
    model = adapted(IncreLoraConfig(r=8, target_modules="all-linear", interval_steps=5, warmup_steps=0, top_h=2))
    with pytest.raises(ScheduleError, match="leaves 3 growth events of 8 ranks in 20 steps, 13 are needed"):
        train(model, 20)
    with pytest.raises(ScheduleError, match="leaves 0 growth events"):
        train(adapted(IncreLoraConfig(r=8, target_modules="all-linear")), 1)


def test_the_published_rule_is_left_as_it_is() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"warmup_steps": 1, "interval_steps": 2, "top_h": 1}
        model = adapted(IncreLoraConfig.paper(r=4, target_modules="all-linear", **options))
        controller, _ = train(model, 8)
    assert {e.step: e.ranks for e in controller.events if e.kind == "birth"} == dict.fromkeys((2, 4, 6), 2)
