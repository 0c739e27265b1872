"""IncreLoRA with the Hugging Face Trainer: nothing to call, nothing to remember.

Run:
    python examples/trainer.py                  # MiniLM on stdlib-docs
    python examples/trainer.py --report-to tensorboard
"""

import argparse

import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from increlora import IncreLoraConfig, rank_summary
from increlora.workbench.tasks import DEFAULT_BACKBONE, load_classifier, load_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_BACKBONE, help="name on the hub, or a folder")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--report-to", default="none", help="where the Trainer logs to, e.g. tensorboard")
    parser.add_argument("--out", default="runs/trainer", help="folder for the adapter")
    options = parser.parse_args()

    base, tokenizer = load_classifier(options.model, num_labels=2, seed=0)
    task = load_task("stdlib-docs", tokenizer)
    config = IncreLoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS")  # instead of LoraConfig(r=8, …)
    model = get_peft_model(base, config)
    print("before", task.evaluate(model))

    arguments = TrainingArguments(
        output_dir=options.out,
        max_steps=options.steps,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        dataloader_pin_memory=torch.cuda.is_available(),
        warmup_steps=options.steps // 20,
        logging_steps=10,
        save_strategy="no",
        report_to=options.report_to,
    )
    Trainer(model=model, args=arguments, train_dataset=task.train, data_collator=task.collate).train()

    print("after", task.evaluate(model))
    print(rank_summary(model))
    model.save_pretrained(options.out)


if __name__ == "__main__":
    main()
