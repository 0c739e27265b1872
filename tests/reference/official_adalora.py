"""A slow, obvious twin of the *published* AdaLoRA code, written from our specification and from torch alone.

    y = x Wᵀ + b + s · x (E ∘ A)ᵀ Bᵀ,   s = α / (r_init + 1e-5)            S_i = s(e_i) + mean s(A_i·) + mean s(B_·i)

It is what `increlora` is compared with, so it shares no code with it and keeps the quirks of the original: the penalty
is part of the loss, statistics are kept by parameter name and made anew at every step, sensitivities join the new
weight with the old gradient, ties at the threshold all go, and after the budget has settled every step ranks the frozen
scores again.
`§` means a section of the specification of the published code (`QingruZhang/AdaLoRA`, commit d10f5eb).
Not modelled: adapter dropout, AMP, the scripts' own optimizer (pass one of torch's), a trainable task head.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.reference.toy import Initial, toy_batches, toy_loss, toy_network


@dataclass(frozen=True)
class OfficialConfig:
    """Settings of one run; `orthogonality` chooses among code and paper (§2.1)."""

    lora_r: int = 4
    target_rank: int = 2
    alpha: float = 16.0
    initial_warmup: int = 20
    final_warmup: int = 60
    mask_interval: int = 10
    beta1: float = 0.85
    beta2: float = 0.85
    gamma: float = 0.1
    orthogonality: str = "trainer"  # "trainer" or "squared"


class OfficialLinear(nn.Module):
    """Frozen W and bias plus a triplet form (§1)."""

    def __init__(self, linear: nn.Linear, a: Tensor, b: Tensor, config: OfficialConfig):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
        self.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        self.lora_A = nn.Parameter(a.detach().clone().to(self.weight))
        self.lora_E = nn.Parameter(self.weight.new_zeros(config.lora_r, 1))
        self.lora_B = nn.Parameter(b.detach().clone().to(self.weight))
        self.ranknum = nn.Parameter(self.weight.new_tensor([float(config.lora_r)]), requires_grad=False)
        self.scaling = config.alpha if config.alpha > 0 else float(config.lora_r)

    def forward(self, x: Tensor) -> Tensor:
        branch = x @ (self.lora_A * self.lora_E).T @ self.lora_B.T
        return nn.functional.linear(x, self.weight, self.bias) + branch * (self.scaling / (self.ranknum + 1e-5))


def adapt(model: nn.Module, initial: Initial, config: OfficialConfig) -> nn.Module:
    """Replace every `nn.Linear` of `model`, in place."""
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]:
        m, n = linear.weight.shape
        a, b = initial(name, 0, "A", (config.lora_r, n)), initial(name, 0, "B", (m, config.lora_r))
        model.set_submodule(name, OfficialLinear(linear, a, b, config))
    return model


def penalty(model: nn.Module, form: str) -> Tensor:
    """Mean over the 2n matrices of ‖·‖_F (code), or the sum of their squares (paper), §2.1."""
    norms = []
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            norms.append(torch.norm(gram - torch.eye(len(gram), dtype=p.dtype), p="fro"))
    return sum(norms) / len(norms) if form == "trainer" else sum(norm**2 for norm in norms)


class OfficialAllocator:
    """§2.2 to §2.7. Call `step(t)` after `optimizer.step()` and before `zero_grad()`, t counting from 0."""

    def __init__(self, model: nn.Module, config: OfficialConfig, total_step: int):
        self.model, self.config, self.total_step = model, config, total_step
        self.names = sorted(n for n, p in model.named_parameters() if p.requires_grad)
        self.modules = [n for n, m in model.named_modules() if isinstance(m, OfficialLinear)]
        self.init_budget = config.lora_r * len(self.modules)
        self.target_budget = config.target_rank * len(self.modules)
        self.I: dict[str, Tensor] = {}
        self.U: dict[str, Tensor] = {}

    def budget(self, t: int) -> tuple[int, bool]:
        """(ranks that may stay, is there a mask at this step?), §2.4."""
        c = self.config
        if t <= c.initial_warmup:
            return self.init_budget, False
        if t > self.total_step - c.final_warmup:
            return self.target_budget, True
        left = 1 - (t - c.initial_warmup) / (self.total_step - c.final_warmup - c.initial_warmup)
        budget = int(self.target_budget + (self.init_budget - self.target_budget) * left**3)
        return budget, t % c.mask_interval == 0

    def step(self, t: int) -> dict[str, list[bool]] | None:
        """Update the statistics, mask if it is time, and return what stays by module; None without a mask."""
        if t < self.total_step - self.config.final_warmup:
            self._update()
        budget, masked = self.budget(t)
        return self._mask(budget) if masked else None

    def _update(self) -> None:
        c, parameters = self.config, dict(self.model.named_parameters())
        for name in self.names:
            p = parameters[name]
            sensitivity = (p * p.grad).abs().detach()
            i, u = self.I.get(name, torch.zeros_like(p)), self.U.get(name, torch.zeros_like(p))
            self.I[name] = i = (c.beta1 * i + (1 - c.beta1) * sensitivity).detach()
            self.U[name] = (c.beta2 * u + (1 - c.beta2) * (sensitivity - i).abs()).detach()

    def scores(self) -> dict[str, Tensor]:
        """Score of every triplet by module, §2.3."""
        found = {}
        for module in self.modules:
            a, e, b = (self.I[f"{module}.lora_{x}"] * self.U[f"{module}.lora_{x}"] for x in "AEB")
            found[module] = e.flatten() + a.mean(dim=1) + b.mean(dim=0)
        return found

    def _mask(self, budget: int) -> dict[str, list[bool]]:
        scores = self.scores()
        threshold = torch.kthvalue(torch.cat(list(scores.values())), self.init_budget - budget).values
        kept = {}
        for module in self.modules:
            gone = scores[module] <= threshold
            self.model.get_submodule(module).lora_E.data[gone] = 0.0
            kept[module] = (~gone).tolist()
        return kept


@dataclass
class Step:
    """One optimizer step as it was afterwards: task loss before it, what stayed, and every tensor by name."""

    loss: float
    kept: dict[str, list[bool]] | None
    tensors: dict[str, Tensor]
    I: dict[str, Tensor]
    U: dict[str, Tensor]


def run_official(
    config: OfficialConfig, make: Callable[..., torch.optim.Optimizer], *, initial: Initial, steps: int,
    accumulation: int = 1, clip: float | None = None, dtype: torch.dtype = torch.float64,
) -> Iterator[Step]:  # fmt: skip
    """Train the toy network; the loss of every micro-batch, penalty included, is divided by their number (§2.6)."""
    model = adapt(toy_network(seed=0, dtype=dtype), initial, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, allocator = make(trained), OfficialAllocator(model, config, steps)
    for t, micro_batches in enumerate(toy_batches(0, steps, accumulation, dtype)):
        total = 0.0
        for x, y in micro_batches:
            task = toy_loss(model(x), y) / accumulation
            total += task.item()
            (task + config.gamma * penalty(model, config.orthogonality) / accumulation).backward()
        if clip:
            nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        kept = allocator.step(t)
        optimizer.zero_grad()
        tensors = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        yield Step(total, kept, tensors, dict(allocator.I), dict(allocator.U))
