"""IncreLoRA in a LightningModule: one line in `configure_optimizers` says how long the run is.

Run:
    python examples/lightning_module.py         # MiniLM on stdlib-docs
"""

import argparse

import pytorch_lightning as pl
import torch
from peft import get_peft_model
from torch.utils.data import DataLoader

from increlora import IncreLoraConfig, attach, rank_summary
from increlora.workbench.tasks import DEFAULT_BACKBONE, load_classifier, load_task


class Classifier(pl.LightningModule):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch, index: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)
        attach(self.model, optimizer, total_steps=int(self.trainer.estimated_stepping_batches))
        return optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_BACKBONE, help="name on the hub, or a folder")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps")
    parser.add_argument("--out", default="runs/lightning", help="folder for checkpoints and the adapter")
    options = parser.parse_args()

    base, tokenizer = load_classifier(options.model, num_labels=2, seed=0)
    task = load_task("stdlib-docs", tokenizer)
    model = get_peft_model(base, IncreLoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS"))
    loader = DataLoader(task.train, batch_size=16, shuffle=True, drop_last=True, collate_fn=task.collate)

    trainer = pl.Trainer(
        max_steps=options.steps,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        logger=False,
        default_root_dir=options.out,
        enable_checkpointing=False,
    )
    trainer.fit(Classifier(model.train()), loader)
    print(task.evaluate(model), rank_summary(model).total)
    model.save_pretrained(options.out)


if __name__ == "__main__":
    main()
