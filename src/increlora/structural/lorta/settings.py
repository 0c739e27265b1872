"""Settings of LoRTA: the default, the published GLUE run as `paper`, and the checks of both."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from ...deltas import Vectors
from ...errors import ConfigError
from ...methods.base import Settings
from ...methods.checks import check_choices, check_counts, check_shares, check_weight
from .attention import ROLES


@dataclass(frozen=True)
class LortaSettings(Settings):
    """Every option of LoRTA; by name or its ending (regex, first match) a module may have its own α.

    Attributes:
        r: rank of the tensor, ≥ 1, one for all modules: r · (d + d_h + H + L + 4) parameters in all (d: width of the
            model, d_h: of a head; H heads, L attention blocks).
        lora_alpha: numerator of the scale α/r.   alpha_pattern: other α.   use_rslora: scale α/√r (a published switch).
        lora_dropout: on the input of ΔW, in [0, 1); every module draws a mask of its own.
        orientation: which side of ΔW carries the heads: the one that has them (`head_aligned`), the input side of all
            modules (`official_peft`), or the output side of all modules (`official_litgpt`).
        init: `official` (A ~ U(±1/√r), C ~ U(±√(6/((1 + 5·init_scale²)·r)))), or `lora_matched` (A ~ U(±1/√d), C ~
            U(±√3)), which at every r starts with the variance that LoRA's A has; B = 0 in both.
        init_scale: the published slope, ≥ 0: larger values make C smaller.
        init_lora_weights: False draws B at random too (for tests).   seed: of the initial values.
    Architecture
        heads: H, of q; None: as the model's config says.   head_dim: d_h, likewise.
        layers: names of the attention blocks, in the order of the rows of C_layer; None: all that the model has.
        matrices: what modules are, by the ending of their names: `q`, `k`, `v`, `o`, or several of q, k and v for
            stacked outputs (`qkv`); looked at before the known names.
    """

    reads = (Vectors,)

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    orientation: Literal["head_aligned", "official_peft", "official_litgpt"] = "head_aligned"
    init: Literal["official", "lora_matched"] = "official"
    init_scale: float = 0.0
    init_lora_weights: bool = True
    heads: int | None = None
    head_dim: int | None = None
    layers: list[str] | None = None
    matrices: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0

    @classmethod
    def paper(cls, r: int = 8, **overrides: Any) -> Self:
        """The published GLUE run: orientation = official_peft, lora_alpha = 1, unless given."""
        published: dict[str, Any] = {"orientation": "official_peft", "lora_alpha": 1.0}
        return cls(r=r, **published | overrides)

    def __post_init__(self) -> None:
        check_counts(self, ("r", "heads", "head_dim"))
        check_choices(self)
        check_shares(self, ("lora_dropout",))
        check_weight(self, "init_scale")
        for ending, roles in self.matrices.items():
            if roles != "o" and not (roles and set(roles) <= set(ROLES[:3]) and len(set(roles)) == len(roles)):
                raise ConfigError(
                    f"matrices: {ending}={roles!r}: give 'q', 'k', 'v', 'o', or several of q, k and v in the order of "
                    f"the outputs, such as 'qkv'"
                )
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise ConfigError(f"layers={self.layers!r}: give names of attention blocks, each once, or None")
