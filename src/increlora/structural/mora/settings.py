"""Settings of MoRA: which square matrix, which fixed maps, which restarts; the published types; the checks of all."""

from dataclasses import dataclass
from typing import Any, Literal, Self

from ...decide.schedules import Run, Time, in_steps
from ...deltas import Vectors
from ...errors import ConfigError
from ...methods.base import Settings
from ...methods.checks import check_choices, check_counts, check_shares
from .delta import Form, Operator
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
class MoraSettings(Settings):
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
        dead_inputs: chunks of the input without a place in a shorter output: `refuse` such a module, `ignore` them
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
        total_steps: optimizer steps of the run, where nobody else can tell.   seed: of permutations.
    """

    reads = (Vectors,)

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    init_lora_weights: bool = True
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
    total_steps: int | None = None
    seed: int = 0

    @classmethod
    def paper(cls, r: int = 8, **overrides: Any) -> Self:
        """The published code; unless given, mora_type = 1, its default (its authors: 1 for a large r, 6 for a small
        one), and lora_dropout = 0.05. Restarts, if any, cycle through the types."""
        chosen: dict[str, Any] = {"mora_type": 1, "side": "round", "lora_dropout": 0.05, "restart_maps": "cycle"}
        if overrides.get("mora_type") == 6:
            chosen["dead_inputs"] = "ignore"
        return cls(**{"r": r} | chosen | overrides)

    def __post_init__(self) -> None:
        check_counts(self, ("r", "total_steps"))
        check_choices(self)
        check_shares(self, ("lora_dropout",))
        self._check_type()
        self._check_operator()
        self._check_side()
        self._check_restarts()
        if self.lora_alpha != 8:
            raise ConfigError(f"lora_alpha={self.lora_alpha}: MoRA has no scale; leave it out, set the learning rate")

    @property
    def maps(self) -> tuple[Operator, Layout, Layout]:
        """Operator, compress and expand, however they were given."""
        return TYPES.get(self.mora_type, (self.operator, self.compress, self.expand))

    @property
    def published(self) -> int | None:
        """Number of these maps in the published code, if they have one."""
        return next((number for number, maps in TYPES.items() if maps == self.maps), None)

    @property
    def form(self) -> Form:
        """The maps of the first round."""
        folded = self.dead_inputs == "fold"
        return Form(*self.maps, wrap=self.pad == "wrap", pairing=self.pairing, fold=folded)

    def _chosen(self, name: str) -> bool:
        """Is an option not at its default?"""
        return getattr(self, name) != type(self).__dataclass_fields__[name].default

    def _check_type(self) -> None:
        if self.mora_type is None:
            return
        if isinstance(self.mora_type, bool) or self.mora_type not in TYPES:
            raise ConfigError(
                f"mora_type={self.mora_type!r}: the published code computes {', '.join(map(str, TYPES))}; truncation "
                f"and decoupling have no number, choose them by `operator`"
            )
        for name in ("operator", "compress", "expand"):
            if self._chosen(name):
                raise ConfigError(f"{name}={getattr(self, name)!r}: mora_type={self.mora_type} says so already")

    def _check_operator(self) -> None:
        for name, operators in GOES_WITH.items():
            if self._chosen(name) and self.maps[0] not in operators:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} means nothing for operator={self.maps[0]!r}, only for "
                    f"{' and '.join(operators)}: leave it out"
                )

    def _check_side(self) -> None:
        if self.side not in ("floor", "round") and (type(self.side) is not int or self.side < 1):
            raise ConfigError(f"side={self.side!r}: give 'floor', 'round' or an int of at least 1")

    def _check_restarts(self) -> None:
        in_steps(self.restart_warmup, Run(1, 1), name="restart_warmup")
        if self.restart_steps is None:
            return
        in_steps(self.restart_steps, Run(1, 1), name="restart_steps")
        if self.restart_steps == 0:
            raise ConfigError("restart_steps=0: give the length of a round, or none for no restarts")
        if self.restart_maps in ROUNDS and self.published not in ROUNDS[self.restart_maps]:
            raise ConfigError(
                f"restart_maps={self.restart_maps!r} goes through the published types {ROUNDS[self.restart_maps]}, and "
                f"a start at {self.published or self.maps[0]!r} is none of them: choose another, or 'permute'"
            )
