"""Every method with tiny options: the one list that contracts, hosts, peft's suite and the probes build on.

Adding a method means adding a row here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from increlora import (
    AdaLoraConfig,
    IncreLoraConfig,
    LoraMiniConfig,
    LortaConfig,
    MeLoraConfig,
    MoraConfig,
    PlainLoraConfig,
    PriLoraConfig,
    SoraConfig,
)

Options = Mapping[str, Any]
Models = Literal["llama", "mlp", "probes", "peft"]
STEPS = 10  # of a run, unless a test says otherwise
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, eq=False)
class Row:
    """A method, and what tests have to know about it.

    Attributes:
        name: of the method, as in the registry.   config_cls: its peft config.
        r: average rank on tiny models.   options: with them everything that happens to ranks happens within 8 steps.
        needs: what it has to be told about some models besides: the Llamas of tests/hosts, the MLP or attention net of
            the contracts, the models of the probes, those of peft's tests. Of several, the first that it accepts.
        unused: options of LoRA that it has no use for and refuses.
        ranks: do they grow from a start below the budget, are they pruned from one above, or are they fixed?
        driven: does something follow the optimizer although ranks are fixed?
        scheduled: must it know the length of the run?   shares: times as shares of a run of unknown length.
        shrinks: is what stays made smaller, too, by a step that moves nothing?
        attention: does it adapt attention alone?   lean: has it fewer parameters than LoRA of rank 1?
        variants: options under which it can do less; the probes say what.
    """

    name: str
    config_cls: Any
    r: int = 3
    options: Options = field(default_factory=dict)
    needs: Mapping[Models, tuple[Options, ...]] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()
    ranks: Literal["grow", "pruned", "fixed"] = "fixed"
    driven: bool = False
    shares: Options = field(default_factory=dict)
    shrinks: bool = False
    attention: bool = False
    lean: bool = False
    variants: tuple[Options, ...] = ()

    def __str__(self) -> str:
        return self.name

    @property
    def moving(self) -> bool:
        return self.ranks != "fixed"

    @property
    def adaptive(self) -> bool:
        """Does it need an optimizer that it can follow?"""
        return self.moving or self.driven

    @property
    def targets(self) -> list[str]:
        """Modules of a Llama."""
        return list(ATTENTION) if self.attention else ["q_proj", "v_proj", "down_proj"]

    def tiny(self, models: Models, steps: int) -> dict[str, Any]:
        """Options for a run of so many steps on these models; all but the targets."""
        length = {"total_steps": steps} if self.adaptive else {}
        return {"r": self.r, **self.options, **length, **self.needs.get(models, ({},))[0]}

    def config(self, *, steps: int = STEPS, **changes: Any) -> Any:
        """For a tiny Llama."""
        return self.config_cls(**{"target_modules": self.targets} | self.tiny("llama", steps) | changes)


EVENTS = {"warmup_steps": 1, "interval_steps": 2}  # after steps 2, 4, …
SHARES = {"warmup_steps": 0.1, "total_steps": None}
CATALOGUE = [
    Row("adalora", AdaLoraConfig, options={**EVENTS, "settle_steps": 0.375}, ranks="pruned", shares=SHARES),
    Row("increlora", IncreLoraConfig, options={**EVENTS, "top_h": 2}, needs={"llama": ({"top_h": 4},)}, ranks="grow",
        shares=SHARES),
    Row("lora", PlainLoraConfig),
    Row("lora_mini", LoraMiniConfig, r=1, options={"inner_in": 3, "inner_out": 3}, lean=True),
    Row("lorta", LortaConfig, attention=True, needs={
        "mlp": ({"heads": 4, "head_dim": 3},),
        "probes": ({"heads": 2, "head_dim": 8},),
        "peft": ({}, *({"matrices": dict.fromkeys(("lin0", "lin1", "conv1d"), "q"), "heads": heads, "head_dim": size}
                       for heads, size in ((2, 10), (2, 1), (1, 1)))),
    }),
    Row("melora", MeLoraConfig, options={"minis": 2}, needs={
        "mlp": ({"minis_pattern": {"head": 1}},), "peft": ({"minis_pattern": {"conv1d": 1}},)}),
    Row("mora", MoraConfig, unused=frozenset({"lora_alpha"}), variants=(
        {"operator": "decoupling", "dead_inputs": "fold"}, {"operator": "rotation", "dead_inputs": "fold"})),
    Row("prilora", PriLoraConfig, options={"interval_steps": 3}, driven=True, shares=SHARES),
    Row("sora", SoraConfig, options={**EVENTS, "settle_steps": 0.375}, ranks="pruned", shrinks=True, shares=SHARES),
]  # fmt: skip
METHODS = {row.name: row for row in CATALOGUE}
