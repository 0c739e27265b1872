"""Settings of IncreLoRA: the default, the published code as `paper`, and the checks of both."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from ..decide.schedules import GrowthSteps, Time
from ..errors import BudgetError, ConfigError, ScheduleError
from .base import Settings
from .checks import check_choices, check_counts, check_shares, check_weight


@dataclass(frozen=True)
class IncreLoraSettings(Settings):
    """Every option of IncreLoRA. Counts are at least 1; times are steps (int) or shares of the run (float in [0, 1]).

    Budget, one of
        r: average rank per module at the end, ≥ 1: r · modules ranks exactly, at most LoRA's adapter parameters.
        total_ranks: ranks over all modules, met exactly.
        total_parameters: bound on Σ rank · (in + out); short by less than one grant.
    Growth
        init_r: rank of every module at the start.   grow_by: ranks per grant; default max(1, r // 2).
        top_h: modules per event; default: the budget is spent in 10 events.
        warmup_steps: no event at or before this step.   interval_steps: events at its multiples.
        capacity: most ranks a module can ever hold; default max(8, 4 r).   capacity_pattern: per module name (regex).
        selection: `exact`, or `published` (ties and overshoot as in the published code).
        reserve: blocks next in line are `trained` in advance, `frozen` (published code without advance learning: they
            count in the penalty only), or there are `none`.
        finish: when the budget is spent, `retire` the reserve, or `keep` training it without effect (published).
    Score
        score: `delta`, or the cheap `signed`.   score_norm: `sqrt_numel` (code) or `mean` (paper).
        beta, beta_uncertainty: moving averages, in [0, 1).   score_window: steps scored before an event; None: all.
        score_accumulation: over micro-batches: `mean`, `last` (published) or `exact`.
    Form
        lora_alpha: numerator α of the scale.   scaling: α / average rank of the budget (`constant`) or
            α / (active rank + scale_epsilon) (`active_rank`).   scale_epsilon: see `scaling`.
        use_rslora: α over the root of what `scaling` says.
        start, newborn: initial values of the first and of later blocks: `lora` (A Kaiming, B = 0, e = 1) or `published`
            (A, B ~ N(0, 0.02²); e = 0, in reserve 1e-5).   init_lora_weights: False draws B at random, for tests.
        lora_dropout: on the input of ΔW, in [0, 1).
    Training
        clock: newborn tensors follow a `ramp` to the host's learning rate or the `published` restart of its linear
            schedule.   birth_warmup: length of that warm-up.
        orthogonality: weight of the penalty, ≥ 0; 0 turns it off.   orthogonality_form: `trainer` (norms, code) or
            `squared` (paper).   penalty_place: whether gradient clipping sees the penalty.
        total_steps: optimizer steps of the run, where nobody else can tell.   seed: of the initial values.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool = True
    total_ranks: int | None = None
    total_parameters: int | None = None
    init_r: int = 1
    grow_by: int | None = None
    top_h: int | None = None
    warmup_steps: Time = 0.05
    interval_steps: Time = 0.03
    capacity: int | None = None
    capacity_pattern: Mapping[str, int] = field(default_factory=dict)
    selection: Literal["exact", "published"] = "exact"
    reserve: Literal["trained", "frozen", "none"] = "none"
    finish: Literal["retire", "keep"] = "retire"
    score: Literal["delta", "signed"] = "delta"
    score_norm: Literal["sqrt_numel", "mean"] = "sqrt_numel"
    beta: float = 0.85
    beta_uncertainty: float = 0.85
    score_window: int | None = 8
    score_accumulation: Literal["mean", "last", "exact"] = "mean"
    scaling: Literal["constant", "active_rank"] = "constant"
    scale_epsilon: float = 0.0
    start: Literal["lora", "published"] = "lora"
    newborn: Literal["lora", "published"] = "lora"
    clock: Literal["ramp", "published"] = "ramp"
    birth_warmup: Time = 0.03
    orthogonality: float = 0.0
    orthogonality_form: Literal["trainer", "squared"] = "trainer"
    penalty_place: Literal["after_clipping", "before_clipping"] = "after_clipping"
    total_steps: int | None = None
    seed: int = 0

    @classmethod
    def paper(cls, r: int = 2, **overrides: Any) -> Self:
        """The published code, step by step, its quirks included; `overrides` are further settings by name.

        Unless given, warmup_steps = interval_steps = birth_warmup = 100 and top_h = 5 (its RTE script)."""
        return cls(**paper_settings(r, **overrides))

    @property
    def step_ranks(self) -> int:
        """Ranks per grant."""
        return self.grow_by or max(1, self.r // 2)

    def __post_init__(self) -> None:
        counts = ("r", "init_r", "grow_by", "top_h", "capacity", "total_ranks", "total_parameters", "total_steps")
        check_counts(self, counts)
        check_choices(self)
        check_shares(self, ("beta", "beta_uncertainty", "lora_dropout"))
        check_weight(self, "orthogonality")
        if self.total_ranks is None and self.total_parameters is None and self.r < self.init_r:
            raise BudgetError(f"r={self.r} is below the start of init_r={self.init_r} ranks per module: lower `init_r`")
        if self.reserve == "trained" and self.newborn != "published":
            raise ConfigError("reserve='trained' learns with e fixed at 1e-5: set newborn='published' beside it")
        if self.selection == "published" and self.total_parameters is not None:
            raise ConfigError("selection='published' counts ranks: use `r` or `total_ranks`, or selection='exact'")


def paper_settings(r: int = 2, **overrides: Any) -> dict[str, Any]:
    """Settings under which IncreLoRA equals its published code; each departure of the default is one of these lines."""
    settings: dict[str, Any] = {
        "r": r, "lora_alpha": 16, "warmup_steps": 100, "interval_steps": 100, "top_h": 5,
        "selection": "published", "score_norm": "sqrt_numel", "score_window": None, "score_accumulation": "last",
        "scaling": "active_rank", "scale_epsilon": 1e-5, "start": "published", "newborn": "published",
        "clock": "published", "orthogonality": 0.1, "orthogonality_form": "trainer",
        "penalty_place": "before_clipping", "reserve": "trained", "finish": "keep",
    } | overrides  # fmt: skip
    return {"birth_warmup": settings["warmup_steps"]} | settings


def check_reachable(steps: GrowthSteps, first: int, stop: int, *, missing: int, per_event: int, strict: bool) -> None:
    """Say before training by how much a schedule falls short of its budget: an error, a warning for the published code
    (which trains on, short)."""
    events = steps.count(first, stop)
    short = missing - events * per_event
    if short <= 0:
        return
    message = (
        f"the schedule (warmup_steps={steps.warmup}, interval_steps={steps.interval}) leaves {events} growth events of "
        f"{per_event} ranks in {stop - first} steps, {math.ceil(missing / per_event)} are needed: {short} of {missing} "
        f"ranks would be missing; shorten `interval_steps` or `warmup_steps`, raise `top_h`, or train longer"
    )
    if strict:
        raise ScheduleError(message)
    warnings.warn(message, stacklevel=2)
