"""What does one module keep for its backward pass? Counted by torch's hooks on saved tensors; frozen factors and
parameters are left out, as they are there anyway.

    .venv/bin/python benchmarks/lora_mini_memory.py

2,048 tokens, base and input in bfloat16, trained parameters in float32 (as peft makes them), no dropout."""

import torch
from torch import Tensor

from increlora.deltas import Delta
from increlora.methods import PlainLora, Site
from increlora.structural.lora_mini.method import LoraMini

TOKENS = 2048
SHAPES = ((768, 8), (4096, 16))  # in = out, r


def ways(r: int) -> dict[str, PlainLora | LoraMini]:
    """Settings by the name in the table."""
    return {
        "LoRA": PlainLora(r=r),
        "LoRA-Mini, `composed`": LoraMini(r=r, forward="composed"),
        "LoRA-Mini, `sequential`": LoraMini(r=r, forward="sequential"),
    }


def made(settings: PlainLora | LoraMini, d: int) -> Delta:
    """A delta of a bfloat16 base whose parameters peft has put in float32."""
    delta = settings.method(1, 2 * d).make_delta(Site("layer", d, d, 1, 2 * d, torch.bfloat16))
    for p in delta.parameters():
        p.data = p.data.float()
    return delta


def kept_bytes(delta: Delta, d: int) -> int:
    """Bytes of all storages that autograd keeps, parameters and buffers left out."""
    known = {t.untyped_storage().data_ptr() for t in (*delta.parameters(), *delta.buffers())}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = torch.randn(TOKENS, d, dtype=torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = delta.add_to(torch.zeros(TOKENS, d, dtype=torch.bfloat16), x)
    y.sum().backward()
    return sum(found.values())


def main() -> None:
    print("| kept for the backward pass | " + " | ".join(f"in = out = {d:,}, r = {r}" for d, r in SHAPES) + " |")
    print("| --- |" + " --- |" * len(SHAPES))
    for name in ways(1):
        cells = [f"{kept_bytes(made(ways(r)[name], d), d) / 2**20:.2f} MiB" for d, r in SHAPES]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
