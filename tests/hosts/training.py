"""A short run of any adapter towards random outputs, whole and interrupted."""

from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import AdamW

from increlora.deltas import Delta
from increlora.hosts.peft.layer import AdapterLayer
from tests.hosts.tiny import adapter_only, inputs_for

STEPS = 14


def train(
    model: PeftModel, kind: str = "bert", *, start: int = 0, stop: int = STEPS, optimizer: AdamW | None = None,
    lr: float = 0.05,
) -> AdamW:  # fmt: skip
    optimizer = optimizer or AdamW(adapter_only(model), lr=lr)
    for step in range(start, stop):
        output = model(**inputs_for(kind))
        output = output if isinstance(output, Tensor) else output.logits
        target = torch.randn(output.shape, generator=torch.Generator().manual_seed(step))
        nn.functional.mse_loss(output, target).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def interrupted(
    build: Callable[[], PeftModel], stop: int, folder: Path, *, steps: int = STEPS, lr: float = 0.05
) -> tuple[PeftModel, PeftModel, PeftModel]:
    """(straight, first, second): a whole run; one that ends after `stop` steps and is saved to `folder`; and a fresh
    model that goes on from there as the Trainer resumes, with the optimizer's state and torch's random state."""
    straight, first, second = (build() for _ in range(3))
    torch.manual_seed(0)
    train(straight, stop=steps, lr=lr)
    torch.manual_seed(0)
    optimizer = train(first, stop=stop, lr=lr)
    state = torch.get_rng_state()
    first.save_pretrained(folder)
    second.load_adapter(folder, "default", is_trainable=True)
    resumed = AdamW(adapter_only(second), lr=lr)
    resumed.load_state_dict(optimizer.state_dict())
    torch.set_rng_state(state)
    train(second, start=stop, stop=steps, optimizer=resumed)
    return straight, first, second


def deltas(model: nn.Module) -> list[Delta]:
    """Deltas of the adapter called "default", in model order."""
    return [m.delta("default") for m in model.modules() if isinstance(m, AdapterLayer)]
