"""Task `planted`: a student learns to imitate a teacher that is itself plus known low-rank updates.

    teacher(x) = net(x; W + ΔW*)        rank(ΔW*) per module: known, 0 to 8        student(x) = net(x; W + ΔW)
    excess loss = ‖student − teacher‖² / ‖net − teacher‖²          1: nothing learnt, 0: the teacher
    recovery    = Σ_modules min(rank, planted rank) / Σ planted ranks

The right allocation is known, so these figures are exact. The planted budget is an average rank of 2: at r = 2 a
perfect allocator has recovery 1."""

import random
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import default_data_collator

from ...hosts.peft import rank_summary
from .base import Batches, Example, Task, TaskOptions

WIDTH, HIDDEN, LAYERS, OUTPUTS = 32, 80, 6, 16
PLANTED_RANKS = (0, 0, 0, 1, 3, 8)  # over the layers of each kind of module: 2 on average, in ranks and in parameters
PLANTED_SHARE = 0.5  # singular values of ΔW*, in units of W's root mean square singular value, from half of it up
TRAIN_SIZE, VALIDATION_SIZE = 8192, 1024


class Layer(nn.Module):
    """x + mix(x), then x + down(gelu(up(x))), each on a normalised input."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.mix(F.rms_norm(x, (WIDTH,))))
        return x + self.down(F.gelu(self.up(F.rms_norm(x, (WIDTH,)))))


class PlantedNet(nn.Module):
    """A small residual net with 18 adaptable modules of three shapes; `seed` draws its weights."""

    base_model_prefix = "trunk"

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.trunk = nn.Sequential(*(Layer() for _ in range(LAYERS)))
            self.head = nn.Linear(WIDTH, OUTPUTS)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        outputs = self.head(self.trunk(x))
        return {"logits": outputs} if labels is None else {"loss": F.mse_loss(outputs, labels), "logits": outputs}


def planted_task(tokenizer: None, options: TaskOptions) -> Task:
    """The task: `seed` draws the net, the plant and the training inputs."""
    net, ranks = PlantedNet(options.seed), planted_ranks(options.seed)
    teacher = plant(PlantedNet(options.seed), ranks, options.seed)
    train = examples(teacher, min(TRAIN_SIZE, options.max_train_samples or TRAIN_SIZE), f"train {options.seed}")
    validation = examples(teacher, min(VALIDATION_SIZE, options.max_eval_samples or VALIDATION_SIZE), "validation")
    untrained = squared_error(net, [default_data_collator(validation)])
    return Task(
        name="planted",
        metric="excess_loss",
        source=f"plant of seed {options.seed}: {sum(ranks.values())} ranks over {len(ranks)} modules",
        train=train,
        validation=validation,
        collate=default_data_collator,
        measure=partial(measure, untrained=untrained, ranks=ranks),
        higher_is_better=False,
        baseline={"excess_loss": 1.0},
    )


def planted_ranks(seed: int) -> dict[str, int]:
    """Rank of the plant at every adaptable module, by module name."""
    draw = random.Random(f"plant {seed}")
    drawn = {kind: draw.sample(PLANTED_RANKS, LAYERS) for kind in ("mix", "up", "down")}
    return {f"trunk.{layer}.{kind}": ranks[layer] for layer in range(LAYERS) for kind, ranks in drawn.items()}


@torch.no_grad()
def plant(net: PlantedNet, ranks: Mapping[str, int], seed: int) -> PlantedNet:
    """Add a random update of the given rank to every module: orthonormal directions, all of similar size."""
    generator = torch.Generator().manual_seed(seed)
    for name, rank in ranks.items():
        weight: Any = net.get_submodule(name).weight
        out_features, in_features = weight.shape
        typical = weight.norm() / min(weight.shape) ** 0.5
        sizes = typical * PLANTED_SHARE * (1 + torch.rand(rank, generator=generator))
        left, right = (
            torch.linalg.qr(torch.randn(size, rank, generator=generator))[0] for size in (out_features, in_features)
        )
        weight += left * sizes @ right.T
    return net


@torch.no_grad()
def examples(teacher: PlantedNet, count: int, name: str) -> list[Example]:
    """Gaussian inputs with the teacher's answers."""
    generator = torch.Generator().manual_seed(random.Random(name).getrandbits(48))
    x = torch.randn(count, WIDTH, generator=generator)
    return [{"x": one, "labels": answer} for one, answer in zip(x, teacher(x)["logits"], strict=True)]


@torch.no_grad()
def squared_error(model: nn.Module, batches: Batches) -> float:
    """Mean over examples of the squared distance to the teacher."""
    total, count = 0.0, 0
    for batch in batches:
        total += float((model(x=batch["x"])["logits"] - batch["labels"]).pow(2).sum())
        count += len(batch["x"])
    return total / count


def measure(model: nn.Module, batches: Batches, *, untrained: float, ranks: Mapping[str, int]) -> dict[str, float]:
    """Excess loss and recovery, as defined above."""
    found = {m.module: m.active for m in rank_summary(model).modules}
    shared = sum(min(found.get(name, 0), rank) for name, rank in ranks.items())
    return {"excess_loss": squared_error(model, batches) / untrained, "recovery": shared / sum(ranks.values())}
