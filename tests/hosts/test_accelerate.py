"""accelerate: a loop that accumulates, saves its state and goes on from it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import PeftModel, get_peft_model
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from increlora import AdaLoraConfig, IncreLoraConfig, SoraConfig, attach, rank_summary
from tests.hosts.tiny import BUILDERS, adapter_only, seeded

STEPS, MICRO = 16, 2
ROWS = torch.randn(STEPS * MICRO * 4, 8, generator=torch.Generator().manual_seed(0))


class Run:
    """A model, its optimizer and its data under one accelerator, as a fresh process would make them."""

    def __init__(self, config: Any) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO)
        base = seeded(BUILDERS["mlp"]).train()
        model = get_peft_model(base, config(r=3, target_modules=["up", "down"]))
        optimizer = torch.optim.AdamW(adapter_only(model), lr=0.05)
        attach(model, optimizer, total_steps=STEPS)
        schedule = LambdaLR(optimizer, lambda step: 1 - step / STEPS / 2)
        prepared = self.accelerator.prepare(model, optimizer, DataLoader(ROWS, batch_size=4), schedule)
        self.wrapped, self.optimizer, self.loader, self.schedule = prepared

    @property
    def model(self) -> PeftModel:
        return self.accelerator.unwrap_model(self.wrapped)

    def train(self, start: int, stop: int) -> None:
        for batch in list(self.loader)[start * MICRO : stop * MICRO]:
            with self.accelerator.accumulate(self.wrapped):
                loss = torch.nn.functional.mse_loss(self.wrapped(batch), batch.roll(1, -1)[:, :3])
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.wrapped.parameters(), 1.0)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()


@pytest.mark.parametrize("config", (IncreLoraConfig, AdaLoraConfig, SoraConfig))
def test_a_state_that_was_saved_is_gone_on_from_bitwise(config: Any, tmp_path: Path) -> None:
    straight = Run(config)
    straight.train(0, STEPS)
    first = Run(config)
    first.train(0, 5)
    first.accelerator.save_state(tmp_path / "state")
    middle = rank_summary(first.model)
    second = Run(config)
    second.accelerator.load_state(tmp_path / "state")
    assert rank_summary(second.model) == middle != rank_summary(straight.model)
    assert second.model.peft_config["default"].ranks == {m.module: m.active for m in middle.modules}
    second.train(5, STEPS)
    assert rank_summary(second.model) == rank_summary(straight.model)
    assert all(torch.equal(p, q) for p, q in zip(straight.model.parameters(), second.model.parameters(), strict=True))
    assert rank_summary(second.model).active == rank_summary(second.model).budget_ranks
