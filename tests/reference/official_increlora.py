"""A slow, obvious twin of the *published* IncreLoRA code, written from our specification and from torch alone.

    ΔW = s · B diag(λ) A,   s = α / (r + 1e-5)             S = Σ|ΔW||∂L/∂ΔW| / √(mn)       Ŝ = I · U

It is what `increlora` is compared with, so it shares no code with it and keeps the quirks of the original: dense ΔW
in every forward, one-rank parameters appended to lists, a new optimizer group per growth event, overshoot, ties that
all grow.
`§` means a section of the specification of the official code (`FeiyuZhang98/IncreLoRA`, commit 51a2d73).
Not modelled: adapter dropout, AMP, the Hugging Face AdamW (pass `torch.optim.AdamW` instead), a trainable task head.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tests.reference.toy import Initial, toy_batches, toy_loss, toy_network

RESERVE_LAMBDA = 1e-5


@dataclass(frozen=True)
class OfficialConfig:
    """Settings of one run, named as in §3.1; the last four choose among variants of code and paper."""

    lora_r: int = 1
    alpha: float = 16.0
    target_rank: float | None = None  # average rank per module, or
    target_total: int | None = None  # total rank
    top_h: int = 2
    incre_rank_num: int | None = None  # k; None: {2: 1, 4: 2, 6: 3, 8: 4}[target_rank]
    init_warmup: int = 5
    interval: int = 5  # ν
    warmup_steps: int = 5  # T_w, of the learning rate
    beta1: float = 0.85
    beta2: float = 0.85
    advance_learn: bool = True
    weight_decay: float | None = None  # of the groups added while training; None: the optimizer's default
    gamma: float = 0.1  # weight of the orthogonality penalty
    orthogonality: str = "trainer"  # "trainer", "squared" or "per_entry", §5
    clock: str = "restart"  # "restart", "shared" or "constant", §4
    score_norm: str = "sqrt_numel"  # "sqrt_numel" (code) or "mean" (paper), §2.3
    rank_eps: float = 1e-5


class OfficialLinear(nn.Module):
    """Frozen W0 (m, n) and bias plus a dense ΔW over all entries, reserve included (§1.2).

    `score` is the S of the latest backward through one use of ΔW. Every use and every micro-batch overwrites it, so
    what remains is the first use (autograd reaches it last) in the last micro-batch (§2.4).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, config: OfficialConfig):
        super().__init__()
        rank = a.shape[0]
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.lora_A, self.lora_E, self.lora_B = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        self.ranknum = nn.Parameter(weight.new_tensor([float(rank)]), requires_grad=False)
        self.alpha = config.alpha if config.alpha > 0 else float(config.lora_r)
        self.rank_eps, self.score_norm = config.rank_eps, config.score_norm
        self.hooked, self.score = True, None
        self.append_entry(a, b, 0.0)

    def append_entry(self, a: Tensor, b: Tensor, value: float) -> None:
        """Append a (rows, n), b (m, rows) and a λ (rows, 1) filled with `value`; all three trainable."""
        like = self.weight
        self.lora_A.append(nn.Parameter(a.detach().clone().to(like)))
        self.lora_E.append(nn.Parameter(like.new_full((a.shape[0], 1), value)))
        self.lora_B.append(nn.Parameter(b.detach().clone().to(like)))

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All entries side by side: A (R, n), λ (R, 1), B (m, R)."""
        return torch.cat(list(self.lora_A), 0), torch.cat(list(self.lora_E), 0), torch.cat(list(self.lora_B), 1)

    def delta(self) -> Tensor:
        a, e, b = self.factors()
        return self.alpha / (self.ranknum + self.rank_eps) * (b @ (e * a))

    def forward(self, x: Tensor) -> Tensor:
        delta = self.delta()
        if self.hooked and delta.requires_grad:
            value = delta.detach()
            delta.register_hook(lambda grad: self._capture(value, grad))
        return nn.functional.linear(x, self.weight, self.bias) + nn.functional.linear(x, delta)

    def _capture(self, delta: Tensor, grad: Tensor) -> None:
        size = delta.numel()
        self.score = (delta.abs() * grad.abs()).sum() / (math.sqrt(size) if self.score_norm == "sqrt_numel" else size)


def adapted(model: nn.Module) -> dict[str, OfficialLinear]:
    """The adapted modules by name, in the order of `named_modules`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, OfficialLinear)}


def adapt(model: nn.Module, initial: Initial, config: OfficialConfig) -> nn.Module:
    """Replace every `nn.Linear` of `model`, in place, by an `OfficialLinear` of rank r0 with λ = 0."""
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]:
        m, n = linear.weight.shape
        a, b = initial(name, 0, "A", (config.lora_r, n)), initial(name, 0, "B", (m, config.lora_r))
        model.set_submodule(name, OfficialLinear(linear.weight, linear.bias, a, b, config))
    return model


class OfficialAllocator:
    """Steps 3a and 3b of §3.2: create the reserve, smooth the scores, grow.

    Call `step(g)` after backward and clipping, before the optimizer step.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, initial: Initial, config: OfficialConfig):
        self.modules, self.optimizer, self.initial, self.config = adapted(model), optimizer, initial, config
        self.k = config.incre_rank_num or {2: 1, 4: 2, 6: 3, 8: 4}[config.target_rank]
        target = config.target_total
        self.target_total = int(config.target_rank * len(self.modules)) if target is None else target
        self.total = config.lora_r * len(self.modules)
        self.I, self.U = dict.fromkeys(self.modules, 0.0), dict.fromkeys(self.modules, 0.0)
        self.created = dict.fromkeys(self.modules, 0)  # reserve blocks created so far
        for group in optimizer.param_groups:
            group.update(birth=-1, base_lr=group["lr"])  # §4: the groups of before training have c = −1

    def importance(self) -> dict[str, float]:
        return {name: self.I[name] * self.U[name] for name in self.modules}

    def step(self, g: int) -> list[str]:
        """Run the allocator of optimizer step g (0-based) and return the names of the modules that grew."""
        if g == 0:
            reserve = [p for name in self.modules for p in self._append_reserve(name)]
            if self.config.advance_learn:
                self._add_group(reserve, g)
        if self.total >= self.target_total:
            return []
        self._smooth()
        if g > self.config.init_warmup and g % self.config.interval == 0:
            return self._grow(g)
        return []

    def _smooth(self) -> None:
        """I ← β1 I + (1−β1) S, then U ← β2 U + (1−β2)|I − S| with the new I (§2.1)."""
        beta1, beta2 = self.config.beta1, self.config.beta2
        for name, module in self.modules.items():
            if module.score is None:
                raise RuntimeError(f"{name}: no backward has reached it (§8, item 16)")
            s = module.score.item()
            self.I[name] = beta1 * self.I[name] + (1 - beta1) * s
            self.U[name] = beta2 * self.U[name] + (1 - beta2) * abs(self.I[name] - s)

    def _grow(self, g: int) -> list[str]:
        """One growth event, §3.3. `chosen` counts modules but is limited by ranks: k > 1 may overshoot."""
        scores = self.importance()
        chosen = min(self.config.top_h, self.target_total - self.total)
        threshold = torch.topk(torch.tensor(list(scores.values()), dtype=torch.float64), chosen).values[-1].item()
        grown = [name for name in self.modules if scores[name] >= threshold]  # ties all grow
        values, vectors = [], []
        for name in grown:
            values_of_module, vectors_of_module = self._activate(name)
            values += values_of_module
            vectors += vectors_of_module
        self._add_group(values + vectors, g)
        if self.total == self.target_total:  # equality only: an overshoot never finishes
            self._finish()
        return grown

    def _activate(self, name: str) -> tuple[list[Tensor], list[Tensor]]:
        """Activate the reserve of one module, append the next; return the λ and the vectors that start to train."""
        module = self.modules[name]
        module.ranknum += self.k
        self.total += self.k
        values = list(module.lora_E)[-self.k :]
        activated = list(module.lora_A)[-self.k :] + list(module.lora_B)[-self.k :]
        fresh = self._append_reserve(name)
        for p in values + activated:
            p.requires_grad_(True)
        return values, fresh if self.config.advance_learn else activated

    def _append_reserve(self, name: str) -> list[Tensor]:
        """Append one block, that is k one-rank entries, with frozen λ; return its a and b (§1.5)."""
        module, learn = self.modules[name], self.config.advance_learn
        m, n = module.weight.shape
        self.created[name] += 1
        a = self.initial(name, self.created[name], "A", (self.k, n))
        b = self.initial(name, self.created[name], "B", (m, self.k))
        for i in range(self.k):
            module.append_entry(a[i : i + 1], b[:, i : i + 1], RESERVE_LAMBDA if learn else 0.0)
            module.lora_E[-1].requires_grad_(False)
            module.lora_A[-1].requires_grad_(learn)
            module.lora_B[-1].requires_grad_(learn)
        return list(module.lora_A)[-self.k :] + list(module.lora_B)[-self.k :]

    def _add_group(self, params: list[Tensor], g: int) -> None:
        defaults, decay = self.optimizer.defaults, self.config.weight_decay
        self.optimizer.add_param_group(
            {
                "params": params,
                "birth": g,
                "base_lr": defaults["lr"],
                "weight_decay": defaults["weight_decay"] if decay is None else decay,
            }
        )

    def _finish(self) -> None:
        for module in self.modules.values():
            module.hooked = False
            for e in list(module.lora_E)[-self.k :]:
                e.data.zero_()


def lr_factor(c: int, g: int, total_steps: int, warmup_steps: int, clock: str = "restart") -> float:
    """Share of the base rate that a group created in the allocator call of step c has in optimizer step g ≥ c (§4).

        s = g − c − 1,  R = T − c − 1:    s / max(1, T_w) while s < T_w,  then max(0, (R − s) / max(1, R − T_w))

    At g = c ≥ 0 it is 1, without effect: there is no gradient yet.
    "shared" puts every group on c = −1; "constant" (the published multi_lr=False) leaves new groups at 1.
    """
    if clock == "shared":
        c = -1
    if g == c or (clock == "constant" and c >= 0):
        return 1.0
    s, rest = g - c - 1, total_steps - c - 1
    if s < warmup_steps:
        return s / max(1, warmup_steps)
    return max(0.0, (rest - s) / max(1, rest - warmup_steps))


def orthogonality(modules: list[OfficialLinear], form: str = "trainer") -> Tensor:
    """R of §5, without its weight γ; every entry of a module concatenated, reserve included.

    "trainer": Σ(‖AAᵀ−I‖ + ‖BᵀB−I‖) / 2M.   "squared": Σ(‖AAᵀ−I‖² + ‖BᵀB−I‖²), the paper.
    "per_entry": mean over parameter entries of the same norm, each entry on its own (the README's helper).
    """

    def excess(rows: Tensor) -> Tensor:
        return torch.linalg.norm(rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device))

    if form == "per_entry":
        return torch.stack([excess(p) for m in modules for p in [*m.lora_A, *(b.T for b in m.lora_B)]]).mean()
    norms = torch.stack([excess(p) for m in modules for p in (m.factors()[0], m.factors()[2].T)])
    return norms.square().sum() if form == "squared" else norms.mean()


@dataclass
class StepRecord:
    """What one optimizer step saw. Scores, EMAs and ranks are those after the allocator call.

    `score` is stale once the budget is met (§8, item 15). `lr_factor` is what the optimizer step used; tensors in no
    group, such as `lora_E` of the reserve, are absent. `delta_norm` (‖ΔW‖_F, reserve included) is taken after it.
    """

    task_loss: float  # mean over micro-batches
    total_loss: float  # task + γR
    score: dict[str, float]
    I: dict[str, float]
    U: dict[str, float]
    importance: dict[str, float]
    rank: dict[str, int]  # active
    total_rank: int
    grown: dict[str, bool]
    lr_factor: dict[str, float]  # by tensor: "blocks.0.up.lora_A0"
    delta_norm: dict[str, float]


@dataclass
class Trace:
    model: nn.Module
    allocator: OfficialAllocator
    steps: list[StepRecord] = field(default_factory=list)
    delta: dict[str, Tensor] = field(default_factory=dict)  # final ΔW by module, reserve included
    parameters: dict[str, Tensor] = field(default_factory=dict)  # final tensors by block: "blocks.0.up.lora_A1"


def named_entries(modules: dict[str, OfficialLinear], k: int) -> Iterator[tuple[str, Tensor]]:
    """Every entry as ("blocks.0.up.lora_A1", tensor); the k entries of one reserve block carry the same name."""
    for name, module in modules.items():
        for letter in "AEB":
            for i, p in enumerate(getattr(module, f"lora_{letter}")):
                yield f"{name}.lora_{letter}{0 if i == 0 else 1 + (i - 1) // k}", p


def block_tensors(modules: dict[str, OfficialLinear], k: int) -> dict[str, Tensor]:
    """Copies of all tensors, the entries of a block joined: A (k, n), E (k, 1), B (m, k)."""
    parts: dict[str, list[Tensor]] = {}
    for key, p in named_entries(modules, k):
        parts.setdefault(key, []).append(p.detach().clone())
    return {key: torch.cat(entries, 1 if ".lora_B" in key else 0) for key, entries in parts.items()}


def run_official(
    config: OfficialConfig,
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    *,
    initial: Initial,
    steps: int,
    seed: int = 0,
    accumulation: int = 1,
    clip_norm: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Trace:
    """Train `toy_network(seed)` on `toy_batches(seed)` for T = `steps` optimizer steps, in the order of §3.2."""
    model = adapt(toy_network(seed, dtype), initial, config)
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    allocator = OfficialAllocator(model, optimizer, initial, config)
    trace = Trace(model, allocator)
    for g, batches in enumerate(toy_batches(seed, steps, accumulation, dtype)):
        task, total = backward(model, batches, config)
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        grown = allocator.step(g)
        for group in optimizer.param_groups:
            group["factor"] = lr_factor(group["birth"], g, steps, config.warmup_steps, config.clock)
            group["lr"] = group["base_lr"] * group["factor"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        trace.steps.append(_record(allocator, task, total, grown))
    trace.delta = {name: module.delta().detach() for name, module in allocator.modules.items()}
    trace.parameters = block_tensors(allocator.modules, allocator.k)
    return trace


def backward(model: nn.Module, batches: list[tuple[Tensor, Tensor]], config: OfficialConfig) -> tuple[float, float]:
    """Accumulate the gradient of (task + γR) / micro-batches, penalty included; return mean task and total loss."""
    task_sum, total_sum = 0.0, 0.0
    for x, y in batches:
        task = toy_loss(model(x), y)
        total = task + config.gamma * orthogonality(list(adapted(model).values()), config.orthogonality)
        (total / len(batches)).backward()
        task_sum, total_sum = task_sum + task.item(), total_sum + total.item()
    return task_sum / len(batches), total_sum / len(batches)


@torch.no_grad()
def _record(allocator: OfficialAllocator, task: float, total: float, grown: list[str]) -> StepRecord:
    modules = allocator.modules
    factor = {id(p): group["factor"] for group in allocator.optimizer.param_groups for p in group["params"]}
    return StepRecord(
        task_loss=task,
        total_loss=total,
        score={name: module.score.item() for name, module in modules.items()},
        I=dict(allocator.I),
        U=dict(allocator.U),
        importance=allocator.importance(),
        rank={name: int(module.ranknum.item()) for name, module in modules.items()},
        total_rank=allocator.total,
        grown={name: name in grown for name in modules},
        lr_factor={key: factor[id(p)] for key, p in named_entries(modules, allocator.k) if id(p) in factor},
        delta_norm={name: module.delta().norm().item() for name, module in modules.items()},
    )
