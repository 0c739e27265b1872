"""A run that is interrupted half-way and continued: bitwise the run that was never interrupted.

Run:
    python examples/resume.py                   # MiniLM on stdlib-docs
"""

import argparse

import torch
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from increlora import IncreLoraConfig, rank_summary
from increlora.workbench.tasks import DEFAULT_BACKBONE, load_classifier, load_task


class Interrupt(TrainerCallback):
    """Stands for whatever ends a run too early."""

    def on_save(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = True


def make_trainer(name: str, steps: int, out: str) -> Trainer:
    """The same model, data and arguments each time, as in a fresh process."""
    base, tokenizer = load_classifier(name, num_labels=2, seed=0)
    task = load_task("stdlib-docs", tokenizer)
    model = get_peft_model(base, IncreLoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS"))
    arguments = TrainingArguments(
        output_dir=out,
        max_steps=steps,
        save_steps=max(1, steps // 2),
        save_total_limit=1,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=10,
        report_to="none",
    )
    return Trainer(model=model, args=arguments, train_dataset=task.train, data_collator=task.collate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_BACKBONE, help="name on the hub, or a folder")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps")
    parser.add_argument("--out", default="runs/resume", help="folder for checkpoints")
    options = parser.parse_args()

    first = make_trainer(options.model, options.steps, options.out)
    first.add_callback(Interrupt())
    first.train()
    print("interrupted:", rank_summary(first.model).total)

    second = make_trainer(options.model, options.steps, options.out)
    second.train(resume_from_checkpoint=True)  # the last checkpoint in the folder, ranks included
    print("continued:  ", rank_summary(second.model).total)


if __name__ == "__main__":
    main()
