"""What is pruned is left out of the forward pass, exports and summaries, whatever an optimizer does between steps.

`ScheduleFree` stands for the package schedulefree, which is no dependency: the same exchange of weights, with SGD.
"""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from increlora import AdaLoraConfig, PriLoraConfig, SoraConfig, export_lora, rank_summary
from tests.hosts.test_undriven import OPTIONS, TOKENS, adamw, llama, step


class ScheduleFree(torch.optim.Optimizer):
    """y = (1 − β) z + β x: gradients are taken at y, z makes the steps, x averages them and is what `eval` shows."""

    def __init__(self, params, lr: float = 0.05, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})
        self.steps, self.trains = 0, True

    def _lerp(self, weight: float) -> None:
        for p in self.param_groups[0]["params"]:
            if "z" in self.state[p]:
                p.data.lerp_(self.state[p]["z"], weight)

    def eval(self) -> None:
        if self.trains:
            self._lerp(1 - 1 / self.param_groups[0]["beta"])
        self.trains = False

    def train(self) -> None:
        if not self.trains:
            self._lerp(1 - self.param_groups[0]["beta"])
        self.trains = True

    @torch.no_grad()
    def step(self) -> None:
        assert self.trains
        self.steps += 1
        share, group = 1 / self.steps, self.param_groups[0]
        for p in group["params"]:
            if p.grad is not None:
                z = self.state[p].setdefault("z", p.detach().clone())
                p.lerp_(z, share).add_(p.grad, alpha=group["lr"] * (group["beta"] * (1 - share) - 1))
                z.sub_(p.grad, alpha=group["lr"])


class LookAhead:
    """Steps another optimizer, and every few steps pulls the weights back to a slow copy, out of sight of its hooks."""

    def __init__(self, optimizer: torch.optim.Optimizer, every: int = 3) -> None:
        self.optimizer, self.every, self.steps = optimizer, every, 0
        self.slow = {p: p.detach().clone() for group in optimizer.param_groups for p in group["params"]}

    def step(self) -> None:
        self.optimizer.step()
        self.steps += 1
        for p, slow in self.slow.items() if self.steps % self.every == 0 else ():
            p.data.copy_(slow.lerp_(p.detach(), 0.5))

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


def zeros(model: nn.Module) -> int:
    return sum(int((p == 0).sum()) for name, p in model.named_parameters() if "lora_A" in name)


def check_left_out(model: PeftModel, folder: Path) -> None:
    """56 ranks wherever one looks, and one function."""
    model.eval()
    with torch.no_grad():
        wanted = model(TOKENS).logits
        exported = export_lora(model, folder / "lora")
        model.save_pretrained(folder / "native")
        again = export_lora(folder / "native", folder / "again")
        assert sum(exported.ranks.values()) == sum(again.ranks.values()) == rank_summary(model).active == 56
        for name in ("lora", "native", "again"):
            found = PeftModel.from_pretrained(llama(), folder / name).eval()(TOKENS).logits
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config_cls", [AdaLoraConfig, SoraConfig, PriLoraConfig])
def test_exchanged_weights_have_no_pruned_ones_among_them(config_cls, tmp_path: Path) -> None:
    options = {"interval_steps": 10} if config_cls is PriLoraConfig else {}  # the last pruning is at the end
    model = get_peft_model(llama(), config_cls(**OPTIONS | options))
    optimizer = ScheduleFree([p for p in model.parameters() if p.requires_grad])
    optimizer.eval()  # nothing is followed so far
    optimizer.train()
    for i in range(30):
        step(model, optimizer)
        if i % 7 == 3:  # an evaluation
            optimizer.eval()
            optimizer.train()
    pruned = zeros(model)
    moved = copy.deepcopy(model.state_dict())
    optimizer.eval()
    assert any(not torch.equal(value, moved[name]) for name, value in model.state_dict().items())
    assert zeros(model) == pruned and (pruned >= 1024 or config_cls is not PriLoraConfig)
    check_left_out(model, tmp_path)
    optimizer.train()
    assert zeros(model) == pruned
    step(model, optimizer)


def test_dropped_ranks_that_come_back_are_left_out(tmp_path: Path) -> None:
    model = get_peft_model(llama(), AdaLoraConfig(**OPTIONS))
    optimizer = LookAhead(adamw(model))
    for _ in range(30):
        step(model, optimizer)
    e = torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "lora_E" in name])
    assert (e != 0).sum() > 56
    check_left_out(model, tmp_path)


def test_an_optimizer_is_not_kept_alive_by_what_is_around_it() -> None:
    import weakref

    model = get_peft_model(llama(), AdaLoraConfig(**OPTIONS))
    optimizer = ScheduleFree([p for p in model.parameters() if p.requires_grad])
    step(model, optimizer)
    gone = weakref.ref(optimizer)
    del optimizer
    assert gone() is None
