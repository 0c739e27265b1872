"""One of two processes of the Hugging Face Trainer (DDP): a straight run, and one that goes on from its checkpoint."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from increlora import rank_summary
from increlora.runtime import controllers_of
from tests.distributed.launch import report
from tests.distributed.llama import STEPS, adapted_llama, logits, tokens
from tests.distributed.toy_run import adapter, same_everywhere

SAVED = STEPS // 2


class Rows(Dataset):
    """Token rows and their labels."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def train(folder: Path, checkpoint: Path | None = None) -> dict[str, Any]:
    """Nothing here names a controller, an optimizer hook or a callback."""
    model = adapted_llama()
    args = TrainingArguments(
        str(folder), use_cpu=True, ddp_backend="gloo", max_steps=STEPS, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, learning_rate=1e-2, save_steps=SAVED, logging_steps=1, report_to="none",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=Rows(tokens(8 * STEPS)))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    summary, (controller,) = rank_summary(model), controllers_of(model)
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "adapter")
    return {
        "ranks": {m.module: m.active for m in summary.modules},
        "budget": summary.budget_ranks,
        "events": [(e.step, e.kind, e.module, e.ranks) for e in controller.events],
        "averages": [controller.rules[0].averages[:, 0].tolist(), controller.rules[0].averages[:, 1].tolist()],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "equal": same_everywhere(model),
        "parameters": adapter(model),
        "logits": logits(model),
    }


def main(folder: str) -> None:
    torch.set_num_threads(1)
    straight = train(Path(folder, "straight"))
    resumed = train(Path(folder, "resumed"), Path(folder, "straight", f"checkpoint-{SAVED}"))
    report(folder, dist.get_rank(), {"straight": straight, "resumed": resumed})
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
