"""LoRTA: one low-rank tensor for the whole model. ΔW of q, k, v and o in every layer are its slices.

    T[i, j, h, m, l] = (α/r) · Σ_ρ A[i, ρ] B[j, ρ] C_head[h, ρ] C_matrix[m, ρ] C_layer[l, ρ]
    q, k, v: ΔW[h·d_h + j, i] = T[i, j, h, m, l]        o: ΔW[i, h·d_h + j] = T[i, j, h, m, l]
    A (d, r), B (d_h, r), C_head (H, r), C_matrix (4, r), C_layer (L, r): r (d + d_h + H + L + 4) parameters in all
    B = 0, A ~ U(±1/√r), C ~ U(±√(6/r)); or as LoRA starts (`init`)

d: width of the model, d_h: of a head; H heads, L attention blocks. With fewer heads, k and v have the means of the rows
of C_head over their groups. The five factors are the model's; a module has no parameters of its own.

Source: LoRTA (arXiv 2410.04060), from its abstract and published code. Differs: docs/methods/lorta.md
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from ...decide.budget import Budget
from ...deltas import Vectors
from ...errors import ConfigError
from ...methods.base import Method, Site, matching
from ...methods.options import Count, LoraOptions, Weight
from ...methods.scaling import scale_of
from ...seeding import generator_of
from .attention import ROLES, blocks, completed, find, interleaved, key_heads, projection
from .delta import TensorBank, TensorDelta


@dataclass(frozen=True)
class Lorta(LoraOptions):
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

    use_rslora: bool = False
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    orientation: Literal["head_aligned", "official_peft", "official_litgpt"] = "head_aligned"
    init: Literal["official", "lora_matched"] = "official"
    init_scale: Weight = 0.0
    heads: Count | None = None
    head_dim: Count | None = None
    layers: list[str] | None = None
    matrices: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def paper(cls, r: int = 8, **overrides: Any) -> Self:
        """The published GLUE run: orientation = official_peft, lora_alpha = 1, unless given."""
        published: dict[str, Any] = {"orientation": "official_peft", "lora_alpha": 1.0}
        return cls(r=r, **published | overrides)

    def __post_init__(self) -> None:
        super().__post_init__()
        for ending, roles in self.matrices.items():
            if roles != "o" and not (roles and set(roles) <= set(ROLES[:3]) and len(set(roles)) == len(roles)):
                raise ConfigError(
                    f"matrices: {ending}={roles!r}: give 'q', 'k', 'v', 'o', or several of q, k and v in the order of "
                    f"the outputs, such as 'qkv'"
                )
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise ConfigError(f"layers={self.layers!r}: give names of attention blocks, each once, or None")

    def method(self, sites: int, uniform_parameters: int) -> Method:
        return Method("lorta", self._delta, Budget(None, self.r * uniform_parameters))

    def adapts(self, name: str) -> bool:
        return find(name, self.matrices) is not None or interleaved(name)  # for these the refusal says why

    def completed(self, model: nn.Module, targets: Iterable[str]) -> dict[str, Any]:
        return completed(self, model, targets)

    def make_shared(self, sites: Sequence[Site]) -> TensorBank:
        if not sites:
            raise ConfigError("LoRTA's factors have the shape of the modules they serve: name them in `target_modules`")
        first = sites[0]
        width = first.out_features if projection(first.name, self.matrices)[1] == "o" else first.in_features
        if self.heads is None or self.head_dim is None:
            missing = "heads" if self.heads is None else "head_dim"
            raise ConfigError(f"{first.name}: {missing} is not given, and the model's config lacks it: set `{missing}`")
        layers, widest = len(self._layers(first)), max(max(s.in_features, s.out_features) for s in sites)
        if max(self.heads, self.head_dim) > widest or self.r > max(1024, width):
            raise ConfigError(
                f"{first.name}: heads={self.heads}, head_dim={self.head_dim} and r={self.r} are more than a model with "
                f"at most {widest} features has: lower them"
            )
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32  # halves round products of five
        rows = {"A": width, "B": self.head_dim, "C_head": self.heads, "C_matrix": len(ROLES), "C_layer": layers}
        return TensorBank(*(self._draw(name, count).to(dtype) for name, count in rows.items()))

    def _draw(self, factor: str, rows: int) -> Tensor:
        """Initial values U(−b, b) of a factor (rows, r), the same on every machine."""
        if factor == "B":
            bound = 0.0 if self.init_lora_weights else 1 / math.sqrt(self.r)
        elif self.init == "lora_matched":
            bound = 1 / math.sqrt(rows) if factor == "A" else math.sqrt(3)
        else:  # Kaiming's law with the columns for a fan-in, of slope √5 for A, √5 · init_scale for C
            bound = math.sqrt(6 / ((1 + 5 * (1 if factor == "A" else self.init_scale**2)) * self.r))
        values = torch.rand(rows, self.r, generator=generator_of(f"{self.seed}/{factor}"))
        return (2 * values - 1) * bound

    def _delta(self, site: Site) -> TensorDelta:
        bank = site.shared
        assert isinstance(bank, TensorBank)
        block, roles = projection(site.name, self.matrices)
        count, layers = self._check(site, roles, bank), self._layers(site)
        if block not in layers:
            raise ConfigError(
                f"{site.name}: its attention block {block} is none of `layers` ({layers[0]}, …), which were filled in "
                f"for another model: make a new config"
            )
        return TensorDelta(
            site.in_features, site.out_features, bank,
            parts=[(ROLES.index(role), len(bank.lora_C_head) if role in "qo" else count) for role in roles],
            layer=layers.index(block),
            scale=partial(scale_of, matching(self.alpha_pattern, site.name) or self.lora_alpha, rslora=self.use_rslora),
            heads_out=roles != "o" if self.orientation == "head_aligned" else self.orientation == "official_litgpt",
            name=site.name, dropout=self.lora_dropout,
        )  # fmt: skip

    def _layers(self, site: Site) -> list[str]:
        return self.layers or blocks((name for name, *_ in site.peers), self.matrices)

    def _check(self, site: Site, roles: str, bank: TensorBank) -> int:
        """Heads of k and of v. Raises ConfigError for a module that is no slice of the tensor."""
        heads, head_dim, width = len(bank.lora_C_head), len(bank.lora_B), len(bank.lora_A)
        read, inner = site.in_features, site.out_features
        if roles == "o":
            read, inner = inner, read
        count = key_heads(roles.replace("o", "q"), inner, heads, head_dim)
        plain = self.orientation == "head_aligned" or (heads * head_dim == width and count == heads)
        if read != width:
            problem = f"width {read}, but the factor that all modules share has {width}: adapt modules of one width"
        elif count is None:
            problem = f"{inner} features are not {roles} of {heads} heads of {head_dim}: set `heads` and `head_dim`"
        elif not plain:
            problem = (
                f"orientation={self.orientation!r} wants heads · head_dim = {heads} · {head_dim} to be the width "
                f"{width}, and as many heads for k and v: use orientation='head_aligned'"
            )
        else:
            return count
        raise ConfigError(f"{site.name}: {problem}, or leave the module out of `target_modules`")
