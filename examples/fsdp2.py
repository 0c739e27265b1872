"""IncreLoRA under FSDP2: parameters sharded over processes, adapter saved whole.

Run:
    torchrun --standalone --nproc-per-node 2 examples/fsdp2.py
"""

import argparse
from itertools import chain, islice, repeat

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from increlora import IncreLoraConfig, attach, rank_summary
from increlora.workbench.tasks import DEFAULT_BACKBONE, load_classifier, load_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_BACKBONE, help="a BERT: name on the hub, or a folder")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps")
    parser.add_argument("--out", default="runs/fsdp2", help="folder for the adapter")
    options = parser.parse_args()

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    process, processes = dist.get_rank(), dist.get_world_size()
    if kind == "cuda":
        torch.cuda.set_device(process % torch.cuda.device_count())
    mesh = init_device_mesh(kind, (processes,))

    base, tokenizer = load_classifier(options.model, num_labels=2, seed=0)
    task = load_task("stdlib-docs", tokenizer)
    config = IncreLoraConfig(r=8, capacity=16, target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(base.to(kind), config)
    for layer in base.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)  # then the optimizer: it must see the sharded parameters
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    attach(model, optimizer, total_steps=options.steps)

    mine = task.train[process::processes]
    loader = DataLoader(mine, batch_size=16, shuffle=True, drop_last=True, collate_fn=task.collate)
    model.train()
    for batch in islice(chain.from_iterable(repeat(loader)), options.steps):
        model(**batch.to(kind)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    print(f"process {process}:", rank_summary(model).total)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if process == 0:  # the only one that holds the whole
        model.save_pretrained(options.out, state_dict=whole)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
