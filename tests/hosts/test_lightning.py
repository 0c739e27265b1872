"""PyTorch Lightning: its optimizers step with closures, it accumulates and clips by itself, and resumes its own way."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader

from increlora import IncreLoraConfig, SoraConfig, attach, rank_summary
from increlora.errors import ScheduleError
from tests.hosts.tiny import BUILDERS

pl = pytest.importorskip("pytorch_lightning", reason="needs pip install pytorch-lightning")
from pytorch_lightning.callbacks import EMAWeightAveraging, StochasticWeightAveraging  # noqa: E402

EPOCHS = 6
BATCHES = 8  # of an epoch; two make an optimizer step
ROWS = [(x, x.roll(1, -1)[:3]) for x in torch.randn(BATCHES * 4, 8, generator=torch.Generator().manual_seed(0))]


class Regression(pl.LightningModule):
    """lengths: the run's length as the trainer told it."""

    def __init__(self, model: PeftModel, *, told: bool = True) -> None:
        super().__init__()
        self.model, self.told, self.lengths = model, told, []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.mse_loss(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)
        self.lengths.append(int(self.trainer.estimated_stepping_batches))
        if self.told:
            attach(self.model, optimizer, total_steps=self.lengths[-1])
        return optimizer


def model(config: Any = IncreLoraConfig, **options: Any) -> PeftModel:
    return get_peft_model(BUILDERS["mlp"]().train(), config(r=3, target_modules=["up", "down"], **options))


class Interrupt(pl.Callback):
    """Stands for whatever ends a run too early."""

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        trainer.should_stop = True


def fit(module: Regression, folder: Path, *, resume: Path | None = None, callbacks: Any = None) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=EPOCHS, accumulate_grad_batches=2, gradient_clip_val=1.0, logger=False, enable_progress_bar=False,
        callbacks=callbacks, enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
        accelerator="cpu",
    )  # fmt: skip
    trainer.fit(module, DataLoader(ROWS, batch_size=4), ckpt_path=resume)
    return trainer


@pytest.mark.parametrize("config", (IncreLoraConfig, SoraConfig))
def test_the_budget_is_met_in_optimizer_steps(config: Any, tmp_path: Path) -> None:
    module = Regression(model(config))
    fit(module, tmp_path)
    assert module.lengths == [EPOCHS * BATCHES // 2]
    assert rank_summary(module.model).active == rank_summary(module.model).budget_ranks


def test_without_the_line_the_first_step_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="total_steps"):
        fit(Regression(model(), told=False), tmp_path)


def test_a_resumed_run_is_the_straight_one(tmp_path: Path) -> None:
    """Bitwise; interrupted in mid-growth, after one epoch of six."""
    straight, first, second = (Regression(model()) for _ in range(3))
    fit(straight, tmp_path)
    fit(first, tmp_path, callbacks=Interrupt()).save_checkpoint(tmp_path / "early.ckpt")
    assert 2 < rank_summary(first.model).active < rank_summary(first.model).budget_ranks
    fit(second, tmp_path, resume=tmp_path / "early.ckpt")
    assert rank_summary(second.model) == rank_summary(straight.model)
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("callback", [
    lambda: EMAWeightAveraging(decay=0.9), lambda: EMAWeightAveraging(decay=0.9, use_buffers=False),
    lambda: StochasticWeightAveraging(swa_lrs=0.01),
], ids=["ema", "ema without buffers", "swa"])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*swap:UserWarning")
def test_averages_of_weights_keep_the_ranks(callback: Any, tmp_path: Path) -> None:
    module = Regression(model())
    fit(module, tmp_path, callbacks=[callback()])
    assert rank_summary(module.model).active == 6
    module.model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(BUILDERS["mlp"](), tmp_path / "saved").eval()
    x = torch.stack([x for x, _ in ROWS])
    assert rank_summary(loaded).active == 6
    torch.testing.assert_close(loaded(x), module.model.eval()(x), rtol=1e-5, atol=1e-6)
