"""The published code is a twin of each method: with every switch turned off it is the method itself."""

from dataclasses import fields
from typing import Any

import pytest
import torch
from peft import get_peft_model

from increlora import AdaLoraConfig, IncreLoraConfig, SoraConfig, attach
from increlora.hosts.peft.old import DEFAULT_SWITCHES
from increlora.registry import METHODS, PAPERS
from tests.reference.toy import toy_batches, toy_loss, toy_network
from tests.switches import every_default

STEPS = 16
SHARED = {"r": 3, "warmup_steps": 1, "interval_steps": 2, "total_steps": STEPS, "seed": 3, "lora_dropout": 0.1}
GROWN, PRUNED = SHARED | {"top_h": 2}, SHARED | {"settle_steps": 6}
CASES: list[tuple[Any, dict[str, Any]]] = [
    (IncreLoraConfig, GROWN),
    (IncreLoraConfig, GROWN | {"score_accumulation": "exact", "orthogonality": 0.1, "use_rslora": True}),
    (IncreLoraConfig, GROWN | {"total_parameters": 200, "score": "signed", "grow_by": 2, "capacity": 5}),
    (AdaLoraConfig, PRUNED),
    (AdaLoraConfig, PRUNED | {"total_ranks": 13, "init_r": 40, "orthogonality": 0.1, "use_rslora": True}),
    (SoraConfig, PRUNED),
    (SoraConfig, PRUNED | {"threshold": 0.01, "levels": 2, "gate_penalty": 0.1, "use_rslora": True}),
]


def trained(config: Any) -> tuple[list[torch.Tensor], list[Any]]:
    """Parameters and events after a short run."""
    model = get_peft_model(toy_network(seed=0), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    controller = attach(model, optimizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for micro_batches in toy_batches(0, STEPS, 2):
            for x, y in micro_batches:
                (toy_loss(model(x), y) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert controller.events
    return [p.detach() for p in model.parameters()], controller.events


@pytest.mark.parametrize(("config_cls", "options"), CASES)
def test_without_its_switches_it_is_the_method(config_cls: Any, options: dict[str, Any]) -> None:
    options = options | {"target_modules": ["up", "down"]}
    parameters, events = trained(config_cls(**options))
    twin = config_cls.paper(**every_default(config_cls.method_name) | options)
    assert type(twin.settings()) is PAPERS[config_cls.method_name]
    same, again = trained(twin)
    assert events == again and all(map(torch.equal, parameters, same))


@pytest.mark.parametrize("method", PAPERS)
def test_every_switch_can_be_turned_off(method: str) -> None:
    own = {option.name for option in fields(METHODS[method])}
    assert set(DEFAULT_SWITCHES[method]) == {option.name for option in fields(PAPERS[method])} - own
    assert own <= {option.name for option in fields(PAPERS[method])}
