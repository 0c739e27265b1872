"""IncreLoRA in an accelerate loop, with gradient accumulation; on one process or many.

Run:
    python examples/accelerate_loop.py
    accelerate launch --num_processes 2 --cpu examples/accelerate_loop.py
"""

import argparse
from itertools import chain, islice, repeat

import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch.utils.data import DataLoader

from increlora import IncreLoraConfig, attach, rank_summary
from increlora.workbench.tasks import DEFAULT_BACKBONE, load_classifier, load_task

ACCUMULATION = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_BACKBONE, help="name on the hub, or a folder")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps")
    parser.add_argument("--out", default="runs/accelerate-loop", help="folder for the adapter")
    options = parser.parse_args()

    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION)
    base, tokenizer = load_classifier(options.model, num_labels=2, seed=0)
    task = load_task("stdlib-docs", tokenizer)
    model = get_peft_model(base, IncreLoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loader = DataLoader(task.train, batch_size=16, shuffle=True, drop_last=True, collate_fn=task.collate)
    attach(model, optimizer, total_steps=options.steps)  # optimizer steps, not micro-batches

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    micro_batches = chain.from_iterable(repeat(loader))
    for batch in islice(micro_batches, options.steps * ACCUMULATION):
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    model = accelerator.unwrap_model(model)
    accelerator.print(task.evaluate(model), rank_summary(model).total)
    model.save_pretrained(options.out, is_main_process=accelerator.is_main_process)
    accelerator.end_training()


if __name__ == "__main__":
    main()
