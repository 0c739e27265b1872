"""IncreLoRA under DistributedDataParallel: every process takes the same decisions.

Run:
    torchrun --standalone --nproc-per-node 2 examples/ddp.py
"""

import argparse
from itertools import chain, islice, repeat

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from increlora import IncreLoraConfig, attach, rank_summary
from increlora.workbench.tasks import DEFAULT_BACKBONE, load_classifier, load_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_BACKBONE, help="name on the hub, or a folder")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps")
    parser.add_argument("--out", default="runs/ddp", help="folder for the adapter")
    options = parser.parse_args()

    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    process, processes = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", process % torch.cuda.device_count()) if cuda else torch.device("cpu")

    base, tokenizer = load_classifier(options.model, num_labels=2, seed=0)
    task = load_task("stdlib-docs", tokenizer)
    # DDP's traffic follows capacity, not rank: keep it modest.
    config = IncreLoraConfig(r=8, capacity=16, target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(base.to(device), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    attach(model, optimizer, total_steps=options.steps)
    wrapped = DistributedDataParallel(model)

    mine = task.train[process::processes]
    loader = DataLoader(mine, batch_size=16, shuffle=True, drop_last=True, collate_fn=task.collate)
    wrapped.train()
    for batch in islice(chain.from_iterable(repeat(loader)), options.steps):
        wrapped(**batch.to(device)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    if process == 0:
        print(task.evaluate(model), rank_summary(model).total)
    model.save_pretrained(options.out, is_main_process=process == 0)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
