"""Settings of AdaLoRA: the default, the published code as `paper`, and the checks of both."""

from dataclasses import dataclass
from typing import Any, Literal, Self

from ..decide.schedules import Time
from ..errors import BudgetError
from .base import Settings
from .checks import check_choices, check_counts, check_shares, check_weight
from .falling import first_rank


@dataclass(frozen=True)
class AdaLoraSettings(Settings):
    """Every option of AdaLoRA. Counts are at least 1; times are steps (int) or shares of the run (float in [0, 1]).

    Budget, one of
        r: average rank per module at the end, ≥ 1: r · modules ranks exactly, at most LoRA's adapter parameters.
        total_ranks: ranks over all modules, met exactly.
    Pruning
        init_r: rank of every module at the start, at most what its shape can use; default 1.5 times the average at the
            end, rounded up.
        warmup_steps: no cut at or before this step.   settle_steps: at the end, with the ranks that are left; ≥ 1.
        interval_steps: cuts at its multiples; between them dropped ranks may come back.
        selection: `exact`, or `published` (ties at the threshold all go; no parameter bound; `init_r` whatever the
            shape; the last cut waits for one step more unless it falls on a multiple of `interval_steps`).
        observe: entries are scored as |w · ∂L/∂w| `before_step` (as the paper states) or with the weights `after_step`
            (published code).   beta, beta_uncertainty: moving averages of that, in [0, 1).
    Form
        lora_alpha: numerator α of the scale.   scaling: α / average rank at the end (`constant`), or α / (init_r +
            scale_epsilon) (`initial_rank`; α ≤ 0 stands for init_r).   scale_epsilon: see `scaling`.
        use_rslora: α over the root of what `scaling` says.
        start: initial values `lora` (A Kaiming, B = 0, e = 1) or `published` (A, B ~ N(0, 0.02²), e = 0).
        init_lora_weights: False draws B at random, for tests.   lora_dropout: on the input of ΔW, in [0, 1).
    Training
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
    init_r: int | None = None
    warmup_steps: Time = 0.1
    settle_steps: Time = 0.4
    interval_steps: Time = 0.01
    selection: Literal["exact", "published"] = "exact"
    observe: Literal["before_step", "after_step"] = "before_step"
    beta: float = 0.85
    beta_uncertainty: float = 0.85
    scaling: Literal["constant", "initial_rank"] = "constant"
    scale_epsilon: float = 0.0
    start: Literal["lora", "published"] = "lora"
    orthogonality: float = 0.0
    orthogonality_form: Literal["trainer", "squared"] = "trainer"
    penalty_place: Literal["after_clipping", "before_clipping"] = "after_clipping"
    total_steps: int | None = None
    seed: int = 0

    @classmethod
    def paper(cls, r: int = 2, **overrides: Any) -> Self:
        """The published code, step by step; `overrides` are further settings by name.

        Unless given, init_r is that of the paper's tables (1 → 2, 2 → 4, 4 → 6, 8 → 12), and warmup_steps = 600,
        settle_steps = 1800, interval_steps = 1, lora_alpha = 32 (its RTE script)."""
        return cls(**paper_settings(r, **overrides))

    def __post_init__(self) -> None:
        check_counts(self, ("r", "init_r", "total_ranks", "total_steps"))
        check_choices(self)
        check_shares(self, ("beta", "beta_uncertainty", "lora_dropout"))
        check_weight(self, "orthogonality")
        if self.total_ranks is None and self.init_r is not None and self.init_r < self.r:
            raise BudgetError(
                f"r={self.r} is above the start of init_r={self.init_r} ranks per module: raise `init_r`, or leave it "
                f"out for {first_rank(self.r)}"
            )


def paper_settings(r: int = 2, **overrides: Any) -> dict[str, Any]:
    """Settings under which AdaLoRA equals its published code; each departure of the default is one of these lines."""
    return {
        "r": r, "init_r": {1: 2, 2: 4}.get(r, first_rank(r)), "lora_alpha": 32,
        "warmup_steps": 600, "settle_steps": 1800, "interval_steps": 1,
        "selection": "published", "observe": "after_step", "scaling": "initial_rank", "scale_epsilon": 1e-5,
        "start": "published", "orthogonality": 0.1, "penalty_place": "before_clipping",
    } | overrides  # fmt: skip
