"""A slow, obvious twin of the *published* SoRA code, written from our specification and from torch alone.

    y = x Wᵀ + b + (α/r) · ((x Aᵀ) ∘ g) Bᵀ          loss + λ · Σ|g| / number of gates          g ← O_ξ(sparse step on g)

It is what `increlora` is compared with, so it shares no code with it and keeps the quirks of the original: the penalty
is part of the loss and divided by the accumulation with it, A and B decay while the gates have an optimizer of their
own without decay, ξ is not multiplied by the learning rate, and the shrink's dead zone is 2ξ wide.
`§` means a section of the specification of the published code (`TsinghuaC3I/SoRA`, commit c275ac2).
Not modelled: adapter dropout, AMP, learning-rate schedules, a trainable task head.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.reference.toy import Initial, toy_batches, toy_loss, toy_network

Make = Callable[[Iterable[Tensor], float], torch.optim.Optimizer]
"""`make(parameters, weight_decay)`"""


@dataclass(frozen=True)
class OfficialConfig:
    """Settings of one run; `levels` = ((step, ξ from there on), …) stands for the phases of a sparsity schedule."""

    r: int = 4
    alpha: float = 16.0
    sparse_lambda: float = 10.0
    levels: tuple[tuple[int, float], ...] = ((0, 3e-4),)
    weight_decay: float = 0.1

    def threshold(self, step: int) -> float:
        return [xi for start, xi in self.levels if start <= step][-1]


class OfficialLinear(nn.Module):
    """Frozen W and bias plus the gated branch (§1)."""

    def __init__(self, linear: nn.Linear, a: Tensor, b: Tensor, gate: Tensor, config: OfficialConfig):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
        self.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        self.lora_A, self.lora_B = nn.Parameter(a.clone()), nn.Parameter(b.clone())
        self.gate = nn.Parameter(gate.clone())
        self.scale = config.alpha / config.r

    def forward(self, x: Tensor) -> Tensor:
        branch = ((x @ self.lora_A.T) * self.gate) @ self.lora_B.T
        return nn.functional.linear(x, self.weight, self.bias) + self.scale * branch


def adapt(model: nn.Module, initial: Initial, config: OfficialConfig) -> nn.Module:
    """Replace every `nn.Linear` of `model`, in place."""
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]:
        m, n = linear.weight.shape
        r = min(config.r, m, n)
        a, b, gate = (initial(name, 0, x, shape) for x, shape in (("A", (r, n)), ("B", (m, r)), ("E", (r, 1))))
        model.set_submodule(name, OfficialLinear(linear, a, b, gate.T, config))
    return model


def shrink(gate: Tensor, xi: float) -> None:
    """The published operator, entry by entry (§2.3)."""
    for i, v in enumerate(gate.data[0].tolist()):
        if v > xi:
            v = v - xi
        elif v < -xi:
            v = v + xi
        gate.data[0, i] = 0.0 if abs(v) < xi else v


class HfAdamW(torch.optim.Optimizer):
    """The AdamW that transformers once had: ε joins the root of the *uncorrected* second moment."""

    def __init__(self, params, lr: float, eps: float = 1e-6, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p] or {"t": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
                state["t"] += 1
                state["m"] = 0.9 * state["m"] + 0.1 * p.grad
                state["v"] = 0.999 * state["v"] + 0.001 * p.grad**2
                self.state[p] = state
                rate = group["lr"] * (1 - 0.999 ** state["t"]) ** 0.5 / (1 - 0.9 ** state["t"])
                p.sub_(rate * state["m"] / (state["v"].sqrt() + group["eps"]))
                p.sub_(group["lr"] * group["weight_decay"] * p)


@dataclass
class Step:
    """One optimizer step as it was afterwards: task loss before it, and every tensor by name."""

    loss: float
    tensors: dict[str, Tensor]


def run_official(
    config: OfficialConfig, make: Make, *, initial: Initial, steps: int, accumulation: int = 1,
    clip: float | None = None,
) -> Iterator[Step]:  # fmt: skip
    """Train the toy network (§2.2): both optimizers step, then every gate is shrunk."""
    model = adapt(toy_network(seed=0), initial, config)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gates = [p for n, p in named.items() if n.endswith("gate")]
    main = make([p for n, p in named.items() if not n.endswith("gate")], config.weight_decay)
    sparse = make(gates, 0.0)
    for t, micro_batches in enumerate(toy_batches(0, steps, accumulation)):
        total = 0.0
        for x, y in micro_batches:
            task = toy_loss(model(x), y)
            total += task.item() / accumulation
            size = sum(gate.abs().sum() for gate in gates) / sum(gate.numel() for gate in gates)
            ((task + config.sparse_lambda * size) / accumulation).backward()
        if clip:
            nn.utils.clip_grad_norm_(list(named.values()), clip)
        main.step()
        sparse.step()
        for gate in gates:
            shrink(gate, config.threshold(t))
        main.zero_grad()
        sparse.zero_grad()
        yield Step(total, {n: p.detach().clone() for n, p in named.items()})
