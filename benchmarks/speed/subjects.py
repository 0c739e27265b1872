"""Who is measured: the frozen floor, peft's methods, the published IncreLoRA, and ours, each trained step by step."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft import get_peft_model
from torch import Tensor, nn

import increlora
from increlora import attach
from tests.reference import official_increlora as official

from .workloads import Batch, Workload

ATTENTION = r".*attention.*(query|key|value|dense)"  # of BERT: LoRTA adapts nothing else
RANK = 8  # average rank per module at the end
RANKS = (1, 2, 16, 64)  # of a curve
INTERVAL = 0.01  # between the cuts of AdaLoRA, as a share of the run


@dataclass
class Session:
    """A model in training.

    Attributes:
        model, optimizer, batch: as they are.   before: an addition to the loss.   after: called after every step, with
        its number.   phase: of the step that was made last.   optimizing: seconds of its optimizer, hooks included.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Batch
    before: Callable[[], Tensor] | None = None
    after: Callable[[int], None] = lambda step: None
    phase: Callable[[], str] = lambda: "step"
    done: int = 0
    optimizing: float = 0.0

    def step(self) -> None:
        loss = self.model(**self.batch).loss
        (loss if self.before is None else loss + self.before()).backward()
        start = time.perf_counter()
        self.optimizer.step()
        self.after(self.done)
        self.optimizing = time.perf_counter() - start
        self.optimizer.zero_grad()
        self.done += 1


Subject = Callable[[Workload, Batch, int], Session]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """The Trainer's default."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)


def floor(workload: Workload, batch: Batch, steps: int) -> Session:
    """Nothing is adapted, but gradients flow through the frozen trunk."""
    model = workload.fresh(batch["labels"].device.type).requires_grad_(False)
    pull = nn.Parameter(torch.zeros((), device=batch["labels"].device))
    first = next(iter(model.get_submodule(workload.stack).children()))
    first.register_forward_pre_hook(lambda module, args: (args[0] + pull.to(args[0].dtype), *args[1:]))
    model.pull = pull
    return Session(model.train(), torch.optim.AdamW([pull], fused=True), batch)


def adapted(config: Callable[[Workload, int], Any]) -> Subject:
    """A subject made by a config of peft's or ours."""

    def start(workload: Workload, batch: Batch, steps: int) -> Session:
        model = workload.fresh(batch["labels"].device.type)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(model, config(workload, steps)).train()
        session = Session(model, optimizer_of(model), batch)
        if isinstance(model.peft_config["default"], peft.AdaLoraConfig):
            session.after = model.base_model.update_and_allocate
        elif type(model.peft_config["default"]).__module__.startswith("increlora"):
            drive(session, steps)
        return session

    return start


def drive(session: Session, steps: int) -> None:
    """Attach our controller, if there is one, and let it say in which phase a step was made."""
    try:
        controller = attach(session.model, session.optimizer, total_steps=steps)
    except increlora.errors.DriveError:  # ranks are fixed and nothing is driven
        return
    known = {"events": 0, "seeing": seeing(controller)}

    def phase() -> str:
        happened, scored = len(controller.events) > known["events"], known["seeing"]
        known.update(events=len(controller.events), seeing=seeing(controller))
        if happened:
            return "event"
        settled = controller.finished
        return "scored" if scored and not settled else "after the budget" if settled else "between events"

    session.phase = phase


def seeing(controller: Any) -> bool:
    """Is the next step scored?"""
    return any("gradients" in rule.wants for rule in controller.rules)


def ours(name: str, **options: Any) -> Subject:
    """One of our methods with these options."""
    make = getattr(increlora, name)
    return adapted(
        lambda workload, steps: make(
            **{"target_modules": workload.targets, "task_type": workload.task, "r": RANK} | options
        )
    )


def theirs(name: str, **options: Any) -> Subject:
    """One of peft's."""
    make = getattr(peft, name)
    return adapted(lambda workload, steps: make(target_modules=workload.targets, task_type=workload.task, **options))


def their_adalora(workload: Workload, steps: int) -> Any:
    """The schedule of ours: from 12 to 8 ranks, with the penalty that peft always adds."""
    return peft.AdaLoraConfig(
        target_modules=workload.targets, task_type=workload.task, init_r=12, target_r=RANK, total_step=steps,
        tinit=round(0.1 * steps), tfinal=round(0.4 * steps), deltaT=max(1, round(INTERVAL * steps)),
    )  # fmt: skip


def dense(workload: Workload, batch: Batch, steps: int) -> Session:
    """IncreLoRA as it was published: ΔW is made, and multiplied with all tokens, in every forward pass."""
    model = workload.fresh(batch["labels"].device.type).requires_grad_(False)
    config = official.OfficialConfig(
        target_rank=RANK, top_h=-(-(RANK - 1) * workload.modules // 4 // 10), incre_rank_num=4,
        init_warmup=round(0.05 * steps), interval=max(1, round(0.03 * steps)), warmup_steps=0,
    )  # fmt: skip
    stack, generator = model.get_submodule(workload.stack), torch.Generator().manual_seed(0)
    device = batch["labels"].device

    def initial(name: str, block: int, letter: str, shape: tuple[int, int]) -> Tensor:
        return 0.02 * torch.randn(shape, generator=generator).to(device)

    official.adapt(stack, initial, config)
    modules = list(official.adapted(stack).values())
    session = Session(model.train(), optimizer_of(model), batch)
    allocator = official.OfficialAllocator(stack, session.optimizer, initial, config)
    session.before = lambda: config.gamma * official.orthogonality(modules)
    inner = session.optimizer.step

    def step() -> None:
        allocator.step(session.done)
        inner()

    session.optimizer.step = step  # type: ignore[method-assign]
    return session


SUBJECTS: dict[str, Subject] = {
    "floor": floor,
    "peft LoRA": theirs("LoraConfig", r=RANK),
    **{f"peft LoRA, r = {r}": theirs("LoraConfig", r=r) for r in RANKS},
    **{f"LoRA, r = {r}": ours("PlainLoraConfig", r=r) for r in RANKS},
    "peft AdaLoRA": adapted(their_adalora),
    "IncreLoRA, published": dense,
    "IncreLoRA": ours("IncreLoraConfig"),
    "IncreLoRA, capacity 8": ours("IncreLoraConfig", r=2, capacity=8, lora_alpha=2),
    "IncreLoRA, capacity 64": ours("IncreLoraConfig", r=2, capacity=64, lora_alpha=2),
    "LoRA": ours("PlainLoraConfig"),
    "AdaLoRA": ours("AdaLoraConfig"),
    "AdaLoRA, penalty": ours("AdaLoraConfig", orthogonality=0.5),
    "SoRA": ours("SoraConfig"),
    "PRILoRA": ours("PriLoraConfig", interval_steps=0.2),
    "MELoRA": ours("MeLoraConfig"),
    "MoRA": ours("MoraConfig"),
    "MoRA, rotation": ours("MoraConfig", operator="rotation", dead_inputs="fold"),
    "LoRTA": ours("LortaConfig", target_modules=ATTENTION, matrices={"dense": "o"}),
    "LoRA-Mini": ours("LoraMiniConfig"),
}
