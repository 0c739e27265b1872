"""MoRA: the parameters of a low-rank pair in one square matrix, whose rank is as high as they allow.

    ΔW = D M C      M (R, R), R ≈ √((in + out) r), zero at the start; C: in → R and D: R → out are fixed
    rank(ΔW) = R for sharing and truncation, min(in, out) for rotation and decoupling; see `deltas.square`

ReMoRA restarts every `restart_steps`: ΔW = Σ D_i M_i C_i, of which the last M learns, and its learning rate rises anew.

Source: MoRA (arXiv 2405.12130), equations 4 to 11, and its published code. Differs: docs/methods/mora.md
"""

import math
from dataclasses import replace
from functools import partial

from ...decide.budget import Budget
from ...decide.schedules import RestartSteps, Run, in_steps, ramp_clock
from ...deltas import Status
from ...errors import ConfigError
from ...methods.base import Method, Site
from ...methods.initial import gaussian, zeros
from ...rules import Restart
from .delta import Form, SquareDelta
from .settings import ROUNDS, TYPES, MoraSettings


class Mora(MoraSettings):
    """Settings (see `MoraSettings`) and how they become a method."""

    def method(self, sites: int, uniform_parameters: int) -> Method:
        parameters = self.side**2 * sites if isinstance(self.side, int) else self.r * uniform_parameters
        restarts = self.restart_steps is not None
        return Method(
            name="mora",
            make_delta=self._delta,
            budget=Budget(None, None if self.side == "round" else parameters),
            clock=self._clock if restarts else None,
            rules=(Restart(self._schedule),) if restarts else (),
            total_steps=self.total_steps,
        )

    def _delta(self, site: Site) -> SquareDelta:
        side = self.side_of(site.in_features, site.out_features)
        for turn in range(4 if self.restart_steps is not None else 1):  # later maps are no others
            check_fits(self.round_form(turn), site, side, self.dead_inputs)
        delta = SquareDelta(
            site.in_features, site.out_features, [side],
            form=partial(type(self).round_form, self),
            init={"M": zeros if self.init_lora_weights else gaussian},
            scale=float, name=site.name, seed=self.seed, dropout=self.lora_dropout, dtype=site.dtype,
        )  # fmt: skip
        delta.status[0] = Status.ACTIVE
        return delta

    def side_of(self, in_features: int, out_features: int) -> int:
        """R of a module.

        floor   ⌊√((in + out) r)⌋        round   the nearest integer        rotation   the even number at or below
        """
        if isinstance(self.side, int):
            return self.side
        numbers = (in_features + out_features) * self.r
        side = math.isqrt(numbers) if self.side == "floor" else (math.isqrt(4 * numbers) + 1) // 2
        return side - side % 2 if self.maps[0] == "rotation" else side

    def round_form(self, turn: int) -> Form:
        """Maps of a round, the first being 0."""
        first = self.form
        if turn == 0 or self.restart_maps == "same":
            return first
        if self.restart_maps == "permute":
            return replace(first, shuffle=f"{self.seed}/{turn}")
        numbers = ROUNDS[self.restart_maps]
        _, compress, expand = TYPES[numbers[(numbers.index(self.published or 0) + turn) % len(numbers)]]
        return replace(first, compress=compress, expand=expand)

    def _schedule(self, run: Run) -> RestartSteps:
        assert self.restart_steps is not None
        return RestartSteps(
            interval=in_steps(self.restart_steps, run, name="restart_steps", least=1),
            warmup=in_steps(self.restart_warmup, run, name="restart_warmup"),
            total=run.steps,
        )

    def _clock(self, step: int, created: int, run: Run) -> tuple[float, None]:
        return ramp_clock(step, created, warmup=in_steps(self.restart_warmup, run, name="restart_warmup")), None


def check_fits(form: Form, site: Site, side: int, dead_inputs: str) -> None:
    """Raise ConfigError, naming the module, if the maps leave inputs without any output or cannot pad so far."""
    shape = site.in_features, site.out_features
    where = f"{site.name} (in={site.in_features}, out={site.out_features}): a matrix of side {side}"
    if reason := form.misfit(site.in_features, side):
        raise ConfigError(f"{where} {reason}")
    dead = form.dead(*shape, side)
    if dead and dead_inputs == "refuse":
        raise ConfigError(
            f"{where} leaves {dead} of the inputs without any output (operator={form.operator!r}): set dead_inputs="
            f"'fold' to add them to other chunks, 'ignore' to do as the published code, or operator='sharing'"
        )
