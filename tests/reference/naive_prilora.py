"""A slow, obvious twin of PRILoRA as we define it, written from the specification (`§`) and from torch alone.

    y = x Wᵀ + b + s_l · x Aᵀ Bᵀ,   s_l = α / r_l or α / mean                                                        §1
    N ← β N + (1 − β) n,   n_j = ‖X_:j‖₂ over a step;   every `interval` steps A_ij ← 0 where |A_ij| N_j is smallest §2

It shares no code with the library: inputs are caught by forward hooks, norms and choices are plain loops over floats.
Not modelled: dropout, phases without pruning, recomputation, several processes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.reference.toy import Initial, toy_batches, toy_loss, toy_network


@dataclass(frozen=True)
class NaiveConfig:
    """Settings of one run; `ranks` by layer of the toy network."""

    ranks: tuple[int, ...]
    alpha: float = 8.0
    constant_scale: bool = False
    share: float = 0.5
    interval: int = 10
    beta: float = 0.9
    by_row: bool = True
    hold: bool = False


class NaiveLinear(nn.Module):
    def __init__(self, linear: nn.Linear, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.weight, self.bias, self.scale = linear.weight.detach().clone(), linear.bias.detach().clone(), scale
        self.lora_A, self.lora_B = nn.Parameter(a.clone()), nn.Parameter(b.clone())
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(x.detach())
        return x @ self.weight.T + self.bias + self.scale * (x @ self.lora_A.T @ self.lora_B.T)


def adapt(network: nn.Module, initial: Initial, config: NaiveConfig) -> dict[str, NaiveLinear]:
    """Replace every linear layer, in place; the modules by name, in model order."""
    mean = sum(config.ranks) / len(config.ranks)
    found = {}
    for name, linear in [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear)]:
        rank = config.ranks[int(name.split(".")[1])]
        m, n = linear.weight.shape
        scale = config.alpha / (mean if config.constant_scale else rank)
        found[name] = NaiveLinear(linear, initial(name, 0, "A", (rank, n)), initial(name, 0, "B", (m, rank)), scale)
        network.set_submodule(name, found[name])
    return found


def feature_norms(inputs: Sequence[Tensor]) -> list[float]:
    """n of one step, feature by feature, over the tokens of all inputs."""
    tokens = [[float(v) for v in token] for x in inputs for token in x]
    return [math.sqrt(sum(token[j] ** 2 for token in tokens)) for j in range(len(tokens[0]))]


def pruned(a: Tensor, norms: Sequence[float], share: float, *, by_row: bool) -> list[tuple[int, int]]:
    """Which entries of A go: the smallest |A_ij| N_j of each row or of all rows together, earlier ones first."""
    rows, columns = a.shape
    scored = [[(abs(float(a[i, j])) * norms[j], i, j) for j in range(columns)] for i in range(rows)]
    groups = scored if by_row else [[entry for row in scored for entry in row]]
    return [(i, j) for group in groups for _, i, j in sorted(group)[: math.floor(share * len(group) + 1e-9)]]


@dataclass
class Step:
    """One optimizer step as it was afterwards: loss before it, tensors by name, N by module, was A pruned?"""

    loss: float
    tensors: dict[str, Tensor]
    norms: dict[str, list[float]]
    pruning: bool


def run_naive(
    config: NaiveConfig,
    make: Callable[..., torch.optim.Optimizer],
    *,
    initial: Initial,
    steps: int,
    accumulation: int = 1,
) -> Iterator[Step]:
    """Train the toy network in float64; steps are counted from 1."""
    network = toy_network(seed=0)
    modules = adapt(network, initial, config)
    optimizer = make(p for p in network.parameters() if p.requires_grad)
    norms: dict[str, list[float]] = {}
    zeros: dict[str, list[tuple[int, int]]] = {}
    for number, micro_batches in enumerate(toy_batches(0, steps, accumulation), start=1):
        total = 0.0
        for x, y in micro_batches:
            loss = toy_loss(network(x), y) / accumulation
            total += loss.item()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, module in modules.items():
            n = feature_norms(module.inputs)
            module.inputs.clear()
            old = norms.get(name, n)
            norms[name] = [config.beta * o + (1 - config.beta) * v for o, v in zip(old, n, strict=True)]
            with torch.no_grad():
                for i, j in zeros.get(name, []) if config.hold else ():
                    module.lora_A[i, j] = 0.0
                if number % config.interval == 0:
                    zeros[name] = pruned(module.lora_A, norms[name], config.share, by_row=config.by_row)
                    for i, j in zeros[name]:
                        module.lora_A[i, j] = 0.0
        tensors = {n: p.detach().clone() for n, p in network.named_parameters() if p.requires_grad}
        yield Step(
            total, tensors, {name: list(values) for name, values in norms.items()}, number % config.interval == 0
        )
