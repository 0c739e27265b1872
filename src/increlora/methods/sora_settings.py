"""Settings of SoRA: at a budget (default), at a fixed threshold, the published code as `paper`, and their checks."""

from dataclasses import dataclass
from typing import Any, Literal, Self

from ..decide.schedules import Time, rising
from ..errors import BudgetError, ConfigError
from .base import Settings
from .checks import check_choices, check_counts, check_shares, check_weight


@dataclass(frozen=True)
class SoraSettings(Settings):
    """Every option of SoRA. Counts are at least 1; times are steps (int) or shares of the run (float in [0, 1]).

    Budget
        r: average rank per module at the end, ≥ 1: r · modules ranks exactly, at most LoRA's adapter parameters. With
            a `threshold`: the rank of every module at the start; what is left at the end is found in training.
        total_ranks: ranks over all modules, met exactly; not with a `threshold`.
    Shrinking
        threshold: ξ > 0, taken from every |gate| after each step; None: chosen at each cut so that the budget is met.
        threshold_unit: `constant` (published code), or `learning_rate`: ξ = threshold · learning rate (paper's rule).
        levels: the threshold rises to its value in so many equal phases.   first_threshold: ξ during the warm-up, ≥ 0.
        spacing: of the levels, `linear`, `geometric` or `log_linear`.
        operator: `exact` soft threshold, or `published` (its dead zone is 2ξ wide).
        init_r: rank of every module at the start, at most what its shape can use; default 1.5 times the average at the
            end, rounded up; not with a `threshold`.
        warmup_steps: nothing shrinks and no cut yet, but for `first_threshold`.   settle_steps: at the end, with the
            ranks that are left; ≥ 1.   interval_steps: ranks are counted, and cut to the budget, at its multiples;
            between them a gate at zero may come back.
        close_after: a rank that did not count at so many counts in a row is not computed any more, and stays out unless
            the bound on parameters leaves no other choice; None: only once all is settled.
    Form
        lora_alpha: numerator α of the scale.   scaling: α / average rank at the end (`constant`), or α / init_r
            (`initial_rank`).   use_rslora: α over the root of that.
        gate_init: gates start at N(0, 1), `normal`, or at `ones`.
        init_lora_weights: False draws B at random, for tests.   lora_dropout: on the input of ΔW, in [0, 1).
    Training
        gate_penalty: weight λ ≥ 0 of mean |gate|, as a gradient; 0 turns it off.   penalty_place: whether gradient
            clipping sees it (in a loop of your own: see `regularization_loss`).
        total_steps: optimizer steps of the run, where nobody else can tell.
        seed: of the initial values.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool = True
    total_ranks: int | None = None
    init_r: int | None = None
    threshold: float | None = None
    threshold_unit: Literal["constant", "learning_rate"] = "constant"
    levels: int = 1
    first_threshold: float = 0.0
    spacing: Literal["linear", "geometric", "log_linear"] = "linear"
    operator: Literal["exact", "published"] = "exact"
    warmup_steps: Time = 0.1
    settle_steps: Time = 0.4
    interval_steps: Time = 0.01
    close_after: int | None = 10
    scaling: Literal["constant", "initial_rank"] = "constant"
    gate_init: Literal["normal", "ones"] = "normal"
    gate_penalty: float = 0.0
    penalty_place: Literal["after_clipping", "before_clipping"] = "after_clipping"
    total_steps: int | None = None
    seed: int = 0

    @classmethod
    def paper(cls, r: int = 8, **overrides: Any) -> Self:
        """The published code, step by step; `overrides` are further settings by name.

        Unless given, threshold = 3e-4, gate_penalty = 10 and lora_alpha = 16 (its STS-B script), and ranks are counted
        every 100 steps, which changes nothing in training."""
        return cls(**paper_settings(r, **overrides))

    def __post_init__(self) -> None:
        check_counts(self, ("r", "init_r", "total_ranks", "levels", "close_after", "total_steps"))
        check_choices(self)
        check_shares(self, ("lora_dropout",))
        check_weight(self, "gate_penalty")
        check_weight(self, "first_threshold")
        if self.threshold is None:
            self._check_budget()
        else:
            self._check_threshold(self.threshold)

    def _check_budget(self) -> None:
        if self.total_ranks is None and self.init_r is not None and self.init_r < self.r:
            raise BudgetError(
                f"r={self.r} is above the start of init_r={self.init_r} ranks per module: raise `init_r`, or leave it "
                f"out for 1.5 times r"
            )
        without = {"threshold_unit": "constant", "levels": 1, "first_threshold": 0.0, "spacing": "linear"}
        for name, usual in without.items():
            if getattr(self, name) != usual:
                raise ConfigError(f"{name}={getattr(self, name)!r} needs a `threshold`: without one it is chosen")

    def _check_threshold(self, threshold: float) -> None:
        if not 0 < threshold < float("inf"):
            raise ConfigError(f"threshold={threshold!r}: give a number above 0, or leave it out to meet a budget")
        for name in ("total_ranks", "init_r"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{name}={getattr(self, name)}: with a `threshold` ranks start at `r` and end where they end; "
                    f"leave out one of the two"
                )
        if self.first_threshold > threshold:
            raise ConfigError(f"first_threshold={self.first_threshold} is above threshold={threshold}: lower it")
        self.thresholds()

    def thresholds(self) -> list[float]:
        """ξ during the warm-up, and of each level after it. Raises ScheduleError for a geometric start at 0."""
        assert self.threshold is not None
        if self.levels == 1:
            return [self.first_threshold, self.threshold]
        return rising(self.first_threshold, self.threshold, self.levels + 1, self.spacing)


def paper_settings(r: int = 8, **overrides: Any) -> dict[str, Any]:
    """Settings under which SoRA equals its published code; each departure of the default is one of these lines."""
    return {
        "r": r, "lora_alpha": 16, "threshold": 3e-4, "operator": "published", "warmup_steps": 0, "settle_steps": 1,
        "interval_steps": 100, "close_after": None, "scaling": "initial_rank",
        "gate_penalty": 10.0, "penalty_place": "before_clipping",
    } | overrides  # fmt: skip
