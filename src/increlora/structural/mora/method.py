"""MoRA: the parameters of a low-rank pair in one square matrix, whose rank is as high as they allow.

    ΔW = D M C      M (R, R), R ≈ √((in + out) r), zero at the start; C: in → R and D: R → out are fixed
    rank(ΔW) = R for sharing and truncation, min(in, out) for rotation and decoupling; see `delta`

ReMoRA restarts every `restart_steps`: ΔW = Σ D_i M_i C_i, of which only the last M learns, each with a warm-up.

Source: MoRA (arXiv 2405.12130), equations 4 to 11, and its published code. Differs: docs/methods/mora.md
"""

import math
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, Self

from ...decide.budget import Budget
from ...decide.schedules import Multiples, Run, Time, in_steps, ramp_clock
from ...deltas import Vectors
from ...errors import ConfigError, ScheduleError
from ...methods.base import Method, Site, in_blocks
from ...methods.initial import gaussian, zeros
from ...methods.options import Count, LoraOptions
from ...methods.scaling import fixed
from ...rules import Restart
from .delta import Operator, SquareDelta, SquareMaps
from .maps import Layout, Pairing

# `mora_type` of the published code; its other numbers raise in the forward pass, and merge to something else.
TYPES: dict[int | None, tuple[Operator, Layout, Layout]] = {
    1: ("sharing", "stride", "stride"), 2: ("sharing", "block", "block"), 3: ("sharing", "block", "stride"),
    4: ("sharing", "stride", "block"), 6: ("rotation", "stride", "stride"),
}  # fmt: skip
ROUNDS = {"cycle": [1, 2, 3, 4], "alternate": [1, 2]}  # by `restart_maps`
# Options that mean something for some operators only.
GOES_WITH = {
    "compress": ("sharing",), "expand": ("sharing",), "pad": ("sharing", "decoupling", "rotation"),
    "pairing": ("rotation",), "dead_inputs": ("decoupling", "rotation"),
}  # fmt: skip


@dataclass(frozen=True)
class Mora(LoraOptions):
    """Every option of MoRA. Times are steps (int) or shares of the run (float in [0, 1]).

    Size
        r: rank ≥ 1 of the LoRA that has as many parameters; sets the side R of the square matrix of each module.
        side: `floor` of √((in + out) · r), never more parameters than LoRA, or `round` (published code; either is made
            even for rotation), or one int ≥ 1 for all modules.
    Maps
        operator: `sharing` sums inputs and repeats outputs over groups; `rotation` applies the matrix to every chunk of
            the input, turned; `decoupling` without turning; `truncation` to the first R inputs and outputs.
        compress, expand: groups of `sharing` for inputs and outputs: `stride` (interleaved) or `block` (runs).
        pad: where R does not divide the inputs, `wrap` counts the first ones twice (published code), `zero` none.
        pairing: entries that `rotation` turns: j with j + R/2 (`half`, published code) or neighbours (`adjacent`).
        dead_inputs: chunks of the input that a shorter output has no room for: `refuse` such a module, `ignore` them
            (published code), or `fold`, which adds them to other chunks.
        mora_type: the maps by their number in the published code, instead of the options above: 1, 2, 3, 4 or 6.
    Restarts
        restart_steps: ReMoRA: after so many steps what was learnt is put aside and the matrix starts anew; None: never.
        restart_maps: of the next round: `permute` inputs and outputs at random, `cycle` through types 1, 2, 3, 4,
            `alternate` between types 1 and 2, or the `same`.   restart_warmup: learning rate rises over so much of it.
    Form
        lora_dropout: on the input of ΔW, in [0, 1).   init_lora_weights: False draws the matrix at random, for tests.
        lora_alpha: MoRA has no scale; anything but LoRA's default is refused.
    Run
        total_steps: optimizer steps of the run, for a loop without Trainer or `attach`.   seed: of permutations.
    """

    reads = (Vectors,)

    side: Literal["floor", "round"] | int = "floor"
    operator: Operator = "sharing"
    compress: Layout = "stride"
    expand: Layout = "stride"
    pad: Literal["wrap", "zero"] = "wrap"
    pairing: Pairing = "half"
    dead_inputs: Literal["refuse", "ignore", "fold"] = "refuse"
    mora_type: Literal[1, 2, 3, 4, 6] | None = None
    restart_steps: Time | None = None
    restart_maps: Literal["permute", "cycle", "alternate", "same"] = "permute"
    restart_warmup: Time = 50
    total_steps: Count | None = None

    @classmethod
    def paper(cls, r: int = 8, **overrides: Any) -> Self:
        """The published code; unless given, mora_type = 1, its default (its authors: 1 for a large r, 6 for a small
        one), and lora_dropout = 0.05. Restarts, if any, cycle through the types."""
        chosen: dict[str, Any] = {"mora_type": 1, "side": "round", "lora_dropout": 0.05, "restart_maps": "cycle"}
        if overrides.get("mora_type") == 6:
            chosen["dead_inputs"] = "ignore"
        return cls(**{"r": r} | chosen | overrides)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_maps()
        if self.side not in ("floor", "round") and (type(self.side) is not int or self.side < 1):
            raise ConfigError(f"side={self.side!r}: give 'floor', 'round' or an int of at least 1")
        self._check_restarts()
        if self.lora_alpha != 8:
            raise ConfigError(f"lora_alpha={self.lora_alpha}: MoRA has no scale; leave it out, set the learning rate")

    def _check_maps(self) -> None:
        chosen = {option.name for option in fields(self) if getattr(self, option.name) != option.default}
        if self.mora_type is not None:
            if isinstance(self.mora_type, bool) or self.mora_type not in TYPES:
                raise ConfigError(
                    f"mora_type={self.mora_type!r}: the published code computes {', '.join(map(str, TYPES))}; "
                    f"truncation and decoupling have no number, choose them by `operator`"
                )
            for name in ("operator", "compress", "expand"):
                if name in chosen:
                    raise ConfigError(f"{name}={getattr(self, name)!r}: mora_type={self.mora_type} says so already")
        for name, operators in GOES_WITH.items():
            if name in chosen and self.maps[0] not in operators:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} means nothing for operator={self.maps[0]!r}, only for "
                    f"{' and '.join(operators)}: leave it out"
                )

    def _check_restarts(self) -> None:
        in_steps(self.restart_warmup, Run(1), name="restart_warmup")
        if self.restart_steps is None:
            return
        in_steps(self.restart_steps, Run(1), name="restart_steps")
        if self.restart_steps == 0:
            raise ConfigError("restart_steps=0: give the length of a round, or none for no restarts")
        if self.restart_maps in ROUNDS and self.published not in ROUNDS[self.restart_maps]:
            raise ConfigError(
                f"restart_maps={self.restart_maps!r} goes through the published types {ROUNDS[self.restart_maps]}, and "
                f"a start at {self.published or self.maps[0]!r} is none of them: choose another, or 'permute'"
            )

    # -- maps ----------------------------------------------------------------------------------------------------

    @property
    def maps(self) -> tuple[Operator, Layout, Layout]:
        """Operator, compress and expand, however they were given."""
        return TYPES.get(self.mora_type, (self.operator, self.compress, self.expand))

    @property
    def published(self) -> int | None:
        """Number of these maps in the published code, if they have one."""
        return next((number for number, maps in TYPES.items() if maps == self.maps), None)

    def round_maps(self, turn: int, in_features: int, out_features: int, side: int) -> SquareMaps:
        """Maps of a round, the first being 0."""
        wrap, fold = self.pad == "wrap", self.dead_inputs == "fold"
        first = SquareMaps(in_features, out_features, side, *self.maps, wrap, self.pairing, fold)
        if turn == 0 or self.restart_maps == "same":
            return first
        if self.restart_maps == "permute":
            return replace(first, shuffle=f"{self.seed}/{turn}")
        numbers = ROUNDS[self.restart_maps]
        _, compress, expand = TYPES[numbers[(numbers.index(self.published or 0) + turn) % len(numbers)]]
        return replace(first, compress=compress, expand=expand)

    def side_of(self, in_features: int, out_features: int) -> int:
        """R of a module.

        floor   ⌊√((in + out) r)⌋        round   the nearest integer        rotation   the even number at or below
        """
        if isinstance(self.side, int):
            return self.side
        numbers = (in_features + out_features) * self.r
        side = math.isqrt(numbers) if self.side == "floor" else (math.isqrt(4 * numbers) + 1) // 2
        return side - side % 2 if self.maps[0] == "rotation" else side

    # -- the method ----------------------------------------------------------------------------------------------

    def method(self, sites: int, uniform_parameters: int) -> Method:
        parameters = self.side**2 * sites if isinstance(self.side, int) else self.r * uniform_parameters
        budget = Budget(None, None if self.side == "round" else parameters)
        if self.restart_steps is None:
            return Method("mora", self._delta, budget, total_steps=self.total_steps)
        rules = (Restart(self._schedule),)
        return Method("mora", self._delta, budget, rules, clock=self._clock, total_steps=self.total_steps)

    def _delta(self, site: Site) -> SquareDelta:
        side = self.side_of(site.in_features, site.out_features)
        for turn in range(4 if self.restart_steps is not None else 1):  # later maps are no others
            self._check_fits(site, self.round_maps(turn, site.in_features, site.out_features, side))
        init = {"M": zeros if self.init_lora_weights else gaussian}
        maps, rounds = partial(Mora.round_maps, self), self._expected_rounds()
        made = {"init": init, "scale": partial(fixed, 1.0), "maps": maps, "rounds": rounds}
        return in_blocks(SquareDelta, self, site, [side], **made)

    def _expected_rounds(self) -> int | None:
        """How many rounds a run finishes, as far as the settings alone tell; None: there is but one."""
        if self.restart_steps is None:
            return None
        if self.total_steps is None and isinstance(self.restart_steps, int):
            return 0
        run = Run(self.total_steps or 10**6)
        interval = in_steps(self.restart_steps, run, name="restart_steps", least=1)
        return Multiples(interval, settle=1, total=run.steps).count

    def _check_fits(self, site: Site, maps: SquareMaps) -> None:
        """Raise ConfigError, naming the module, if the maps leave inputs without any output or cannot pad so far."""
        where = f"{site.name} (in={site.in_features}, out={site.out_features}): a matrix of side {maps.side}"
        if reason := maps.misfit:
            raise ConfigError(f"{where} {reason}")
        if maps.dead and self.dead_inputs == "refuse":
            raise ConfigError(
                f"{where} leaves {maps.dead} of the inputs without any output (operator={maps.operator!r}): set "
                f"dead_inputs='fold' to add them to other chunks, 'ignore' to do as the published code, or "
                f"operator='sharing'"
            )

    def _schedule(self, run: Run) -> Multiples:
        """After each round but the last. (The published code also restarts after the last step.)"""
        interval = in_steps(self.restart_steps or 0, run, name="restart_steps", least=1)
        warmup = in_steps(self.restart_warmup, run, name="restart_warmup")
        if run.steps is not None and interval >= run.steps:
            raise ScheduleError(
                f"no restart falls into a run of {run.steps} steps (restart_steps={interval}): lower `restart_steps`, "
                f"a share such as 0.2 fits any run"
            )
        if warmup > interval:
            raise ScheduleError(
                f"restart_warmup={warmup} is longer than a round of restart_steps={interval} steps: lower it"
            )
        return Multiples(interval, settle=1, total=run.steps)

    def _clock(self, step: int, created: int, run: Run) -> tuple[float, None]:
        return ramp_clock(step, created, warmup=in_steps(self.restart_warmup, run, name="restart_warmup")), None
