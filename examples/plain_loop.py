"""IncreLoRA in a training loop of your own: one call says how long the run is.

Run:
    python examples/plain_loop.py               # MiniLM on stdlib-docs
"""

import argparse
from itertools import chain, count, islice

import torch
from peft import get_peft_model

from increlora import IncreLoraConfig, attach, rank_summary
from increlora.workbench.tasks import DEFAULT_BACKBONE, load_classifier, load_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_BACKBONE, help="name on the hub, or a folder")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--out", default="runs/plain-loop", help="folder for the adapter")
    options = parser.parse_args()

    base, tokenizer = load_classifier(options.model, num_labels=2, seed=0)
    task = load_task("stdlib-docs", tokenizer)
    model = get_peft_model(base, IncreLoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS"))

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=options.steps)
    controller = attach(model, optimizer, total_steps=options.steps)  # schedules are shares of the run

    epochs = (task.batches(32, seed=0, epoch=epoch) for epoch in count())
    model.train()
    for batch in islice(chain.from_iterable(epochs), options.steps):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()  # ranks grow here
        scheduler.step()
        optimizer.zero_grad()

    for event in controller.events:
        if event.ranks:
            print(f"step {event.step}: {event.module} has {event.ranks} more ranks, {event.rank} now")
    print(task.evaluate(model), rank_summary(model).total)
    model.save_pretrained(options.out)


if __name__ == "__main__":
    main()
