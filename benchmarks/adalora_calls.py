"""How many torch operations does AdaLoRA add to a training step? Ours and peft's, each beside its own LoRA.

    .venv/bin/python benchmarks/adalora_calls.py

A small BERT with 36 adapted linear maps; every aten call of forward, backward, optimizer step and pruning counts, as
each of them is at least one kernel launch on an accelerator; views, allocations and numbers read on the host do not
count. Calls, not time: they do not depend on machine or width."""

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from peft import AdaLoraConfig as PeftAdaLoraConfig
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification

from increlora import AdaLoraConfig, PlainLoraConfig

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2, "vocab_size": 64}
TARGETS = r".*encoder.*(query|key|value|dense)"
STEPS, WARMUP, INTERVAL, SETTLE = 40, 4, 10, 10
SCHEDULE = {"warmup_steps": WARMUP, "interval_steps": INTERVAL, "settle_steps": SETTLE, "total_steps": STEPS}
MOMENTS = {"between cuts": 15, "at a cut": 20, "settled": 35}


class Calls(TorchDispatchMode):
    """Counts torch operations; allocating is no launch, nor is reading step counters on the host, as AdamW does."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and not any(name in str(func) for name in ("_local_scalar_dense", "empty"))
        return func(*args, **(kwargs or {}))


def counted(
    config: Any, after: Callable[[Any, int], None] = lambda model, step: None, *, moments: Mapping[str, int] = MOMENTS
) -> dict[str, int]:
    """Calls of one step at each of these moments, name → step."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(BertForSequenceClassification(BertConfig(**SHAPE)), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=True)  # as on a GPU
    ids, labels = torch.randint(0, 64, (4, 8)), torch.tensor([0, 1, 0, 1])
    found = {}
    for step in range(STEPS):
        calls = Calls()
        with calls if step in moments.values() else nullcontext():
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            after(model, step)
        optimizer.zero_grad()
        found |= {moment: calls.count for moment, at in moments.items() if step == at}
    adapted = sum(isinstance(m, nn.Linear) for n, m in model.named_modules() if n.endswith("base_layer"))
    assert adapted == 36, adapted
    return found


def added() -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Calls of a step with LoRA, ours and peft's; and how many more there are with AdaLoRA, by row and moment."""
    shared = {"r": 8, "target_modules": TARGETS, "task_type": "SEQ_CLS"}
    theirs = {**shared, "init_r": 12, "target_r": 8, "tinit": WARMUP, "tfinal": SETTLE, "deltaT": INTERVAL}
    theirs |= {"total_step": STEPS, "orth_reg_weight": 0.1}
    theirs.pop("r")
    lora = {"ours": counted(PlainLoraConfig(**shared)), "peft": counted(LoraConfig(**shared))}
    rows = {
        "ours, default": ("ours", counted(AdaLoraConfig(**shared, **SCHEDULE))),
        "ours, with penalty": ("ours", counted(AdaLoraConfig(**shared, **SCHEDULE, orthogonality=0.1))),
        "peft": ("peft", counted(PeftAdaLoraConfig(**theirs), lambda m, step: m.base_model.update_and_allocate(step))),
    }
    more = {name: {at: row[at] - lora[beside][at] for at in MOMENTS} for name, (beside, row) in rows.items()}
    return {name: row["settled"] for name, row in lora.items()}, more


def main() -> None:
    torch.set_num_threads(1)  # the model is too small to share between threads
    lora, more = added()
    print(f"| calls added to LoRA (ours {lora['ours']}, peft {lora['peft']}) | {' | '.join(MOMENTS)} |")
    print(f"| --- |{' --- |' * len(MOMENTS)}")
    for name, row in more.items():
        print(f"| {name} | {' | '.join(map(str, row.values()))} |")
    for name in ("ours, default", "ours, with penalty"):
        shares = (f"{more[name][at] / more['peft'][at]:.3f}" for at in MOMENTS)
        print(f"| {name} ÷ peft | {' | '.join(shares)} |")


if __name__ == "__main__":
    main()
