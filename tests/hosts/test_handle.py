"""One owner per adapter: the method is made once, and what is saved says what the saved adapter is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from increlora import IncreLoraConfig, export_lora, rank_summary
from increlora.hosts.peft.layer import handle_of
from increlora.methods import IncreLora
from tests.hosts.test_own_rule import optimizer_of, steps
from tests.hosts.tiny import Mlp, seeded

STEPS = 16
TARGETS = ["up", "down", "head"]
PAPER = {
    "warmup_steps": 1,
    "interval_steps": 2,
    "top_h": 1,
    "grow_by": 1,
    "total_steps": STEPS,
    "target_modules": TARGETS,
}


def adapted(config: Any) -> Any:
    return get_peft_model(seeded(Mlp).double(), config)


def saved_config(adapter: Any, folder: Path) -> dict[str, Any]:
    adapter.save_pretrained(folder)
    return json.loads((folder / "adapter_config.json").read_text())


def test_the_method_is_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[tuple[int, int]] = []
    method = IncreLora.method
    monkeypatch.setattr(IncreLora, "method", lambda self, *totals: (made.append(totals), method(self, *totals))[1])
    options = {"warmup_steps": 1, "interval_steps": 2, "top_h": 2, "total_steps": STEPS, "target_modules": "all-linear"}
    adapter = adapted(IncreLoraConfig(r=3, **options))
    steps(adapter, optimizer_of(adapter), 0, STEPS)
    rank_summary(adapter)
    adapter.save_pretrained(tmp_path)
    export_lora(adapter, tmp_path / "lora")
    assert made == [(3, 51)]


@pytest.mark.parametrize("stop", [1, 5, 8])
def test_a_resumed_run_saves_the_config_of_a_straight_one(stop: int, tmp_path: Path) -> None:
    """With a reserve, whose blocks change state between growth events."""
    straight, first, second = (adapted(IncreLoraConfig.paper(3, **PAPER)) for _ in range(3))
    optimizer = optimizer_of(first)
    steps(first, optimizer, 0, stop)
    second.load_state_dict(first.state_dict())
    resumed = optimizer_of(second)
    resumed.load_state_dict(optimizer.state_dict())
    steps(second, resumed, stop, 10)
    steps(straight, optimizer_of(straight), 0, 10)
    found, expected = saved_config(second, tmp_path / "resumed"), saved_config(straight, tmp_path / "straight")
    assert found == expected and 1 in found["blocks"]["up"]
    assert found["blocks"] == {n: [int(s) for s in d.state.status] for n, d in handle_of(second).blocks.items()}


def test_two_models_with_one_config_save_their_own_ranks(tmp_path: Path) -> None:
    config = IncreLoraConfig(r=3, warmup_steps=1, interval_steps=2, top_h=2, total_steps=STEPS, target_modules=TARGETS)
    trained, fresh = adapted(config), adapted(config)
    steps(trained, optimizer_of(trained), 0, STEPS)
    assert sum(saved_config(fresh, tmp_path / "fresh")["ranks"].values()) == 3
    assert sum(saved_config(trained, tmp_path / "trained")["ranks"].values()) == 9
    loaded = PeftModel.from_pretrained(seeded(Mlp).double(), tmp_path / "trained")
    x = torch.randn(2, 8, dtype=torch.float64)
    assert torch.equal(loaded(x), trained.eval()(x))


def test_a_file_saved_by_an_inference_model_resumes_as_the_first_one(tmp_path: Path) -> None:
    trained = adapted(IncreLoraConfig.paper(3, **PAPER))
    steps(trained, optimizer_of(trained), 0, 5)
    trained.save_pretrained(tmp_path / "first")
    PeftModel.from_pretrained(seeded(Mlp).double(), tmp_path / "first").save_pretrained(tmp_path / "second")
    loaded = [
        handle_of(PeftModel.from_pretrained(seeded(Mlp).double(), tmp_path / name, is_trainable=True)).blocks.values()
        for name in ("first", "second")
    ]
    for one, other in zip(*loaded, strict=True):
        assert one.statistics[0].all() and torch.equal(one.get_extra_state(), other.get_extra_state())
