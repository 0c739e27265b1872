"""MoRA and ReMoRA, every step in float64, against a twin that trains M in a dense ΔW and merges as the paper does."""

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from increlora import MoraConfig
from increlora.structural.mora.maps import shuffled
from tests.parity.test_melora import STEPS, network, step_once
from tests.reference.naive_mora import TYPES, linear_map

TARGETS = ["up", "down", "last"]  # 12 → 36 → 24 → 24
CYCLE = [1, 2, 3, 4]


class Twin(nn.Module):
    """y = W x + b + (T M) x, T as the loops of the specification say; `merge` is the published restart."""

    def __init__(self, linear: nn.Linear, side: int, operator: str, options: dict) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight.detach().clone(), linear.bias.detach().clone()
        self.M = nn.Parameter(torch.zeros(side, side, dtype=torch.float64))
        self.set_maps(operator, options)

    def set_maps(self, operator: str, options: dict, key: str = "") -> None:
        out, k = self.weight.shape
        self.T = linear_map(operator, len(self.M), k, out, **options)
        if key:  # the library's permutations: column perm[j] of x is read as entry j
            self.T = self.T[shuffled(f"{key}/out", out, torch.device("cpu"))]
            self.T = self.T[:, shuffled(f"{key}/in", k, torch.device("cpu")).argsort()]

    def delta(self) -> Tensor:
        return torch.einsum("oiab,ab->oi", self.T, self.M)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight + self.delta()).T + self.bias

    @torch.no_grad()
    def merge(self) -> None:
        self.weight += self.delta()
        self.M.zero_()


def twins(model: nn.Module, sides: dict[str, int], operator: str, options: dict) -> dict[str, Twin]:
    found = {name: Twin(model.get_submodule(name), sides[name], operator, options) for name in TARGETS}
    for name, twin in found.items():
        model.set_submodule(name, twin)
    return found


def pair(twin_operator: str = "sharing", twin_options: dict | None = None, **options):
    ours = get_peft_model(network(), MoraConfig(target_modules=TARGETS, total_steps=STEPS, **options))
    deltas = {name: ours.base_model.model.get_submodule(name).delta("default") for name in TARGETS}
    theirs = network()
    return (
        ours,
        theirs,
        deltas,
        twins(theirs, {name: delta.side for name, delta in deltas.items()}, twin_operator, twin_options or {}),
    )


def adamw(model: nn.Module) -> AdamW:
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.1)


def sgd(model: nn.Module) -> SGD:
    return SGD([p for p in model.parameters() if p.requires_grad], lr=0.02, momentum=0.9)


@pytest.mark.parametrize("make", [adamw, sgd])
@pytest.mark.parametrize(("options", "operator", "twin_options"), [
    *(({"mora_type": n}, "sharing", {"compress": c, "expand": e}) for n, (c, e) in TYPES.items()),
    ({"pad": "zero"}, "sharing", {"wrap": False}),
    ({"operator": "truncation"}, "truncation", {}),
    ({"operator": "rotation", "dead_inputs": "fold"}, "rotation", {"fold": True}),
    ({"operator": "decoupling", "dead_inputs": "ignore"}, "decoupling", {}),
], ids=str)  # fmt: skip
def test_every_step_equals_the_naive_twin(options: dict, operator: str, twin_options: dict, make) -> None:
    ours, theirs, deltas, naive = pair(operator, twin_options, r=1, **options)  # sides 6 or 7, 7 or 6, 6
    optimizers = make(ours), make(theirs)
    first = None
    for step in range(STEPS):
        losses = [step_once(model, o, step) for model, o in zip((ours, theirs), optimizers, strict=True)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
        first = first or losses[0]
    assert losses[0] != first
    for name, delta in deltas.items():
        torch.testing.assert_close(delta.lora_M0, naive[name].M, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(("maps", "start"), [("cycle", 2), ("alternate", 1), ("same", 3), ("permute", 4)])
def test_restarts_equal_merging_into_the_base(maps: str, start: int, warmup: int) -> None:
    interval = 40
    ours, theirs, deltas, naive = pair(
        twin_options=dict(zip(("compress", "expand"), TYPES[start], strict=True)), r=1, mora_type=start,
        restart_steps=interval, restart_maps=maps, restart_warmup=warmup, seed=5,
    )  # fmt: skip
    optimizers, turn = (adamw(ours), adamw(theirs)), 0
    for step in range(STEPS):
        since = step - turn * interval + 1
        optimizers[1].param_groups[0]["lr"] = 5e-3 * (min(1.0, since / warmup) if turn and warmup else 1.0)
        losses = [step_once(model, o, step) for model, o in zip((ours, theirs), optimizers, strict=True)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-8)
        if (step + 1) % interval or step + 1 == STEPS:
            continue
        turn += 1
        number = {"cycle": CYCLE[(start - 1 + turn) % 4], "alternate": 1 + (start - 1 + turn) % 2}.get(maps, start)
        maps_now = dict(zip(("compress", "expand"), TYPES[number], strict=True))
        for twin in naive.values():
            twin.merge()
            twin.set_maps("sharing", maps_now, f"5/{turn}" if maps == "permute" else "")
            optimizers[1].state.pop(twin.M)
    assert turn == deltas["up"].turns == 5
    for name, delta in deltas.items():
        base = network().get_submodule(name).weight
        torch.testing.assert_close(
            base + delta.weight(), naive[name].weight + naive[name].delta(), rtol=1e-7, atol=1e-8
        )
