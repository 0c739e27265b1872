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
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...decide.budget import Budget
from ...errors import ConfigError
from ...methods.base import Method, Site, matching
from ...methods.scaling import scale_of
from ...seeding import generator_of
from .attention import ROLES, blocks, find, interleaved, key_heads, place
from .delta import TensorBank, TensorDelta
from .heads import completed
from .settings import LortaSettings


class Lorta(LortaSettings):
    """Settings (see `LortaSettings`) and how they become a method."""

    def method(self, sites: int, uniform_parameters: int) -> Method:
        return Method("lorta", self._delta, Budget(None, self.r * uniform_parameters))

    def places(self, name: str) -> bool:
        return find(name, self.matrices) is not None or interleaved(name)  # of these the refusal says why

    def completed(self, model: nn.Module, targets: Iterable[str]) -> dict[str, Any]:
        return completed(self, model, targets)

    def make_shared(self, sites: Sequence[Site]) -> TensorBank:
        if not sites:
            raise ConfigError("LoRTA's factors have the shape of the modules they serve: name them in `target_modules`")
        first = sites[0]
        width = first.out_features if place(first.name, self.matrices)[1] == "o" else first.in_features
        heads, head_dim = self._heads(first.name)
        layers = len(self._layers(first))
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32  # a product of five is none for halves
        rows = {"A": width, "B": head_dim, "C_head": heads, "C_matrix": len(ROLES), "C_layer": layers}
        return TensorBank(*(self._draw(name, count).to(dtype) for name, count in rows.items()))

    def _draw(self, factor: str, rows: int) -> Tensor:
        """Initial values (rows, r) of a factor, the same on every machine."""
        values = torch.rand(rows, self.r, generator=generator_of(f"{self.seed}/{factor}"))
        return (2 * values - 1) * self._bound(factor, rows)

    def _bound(self, factor: str, rows: int) -> float:
        """b of U(−b, b)."""
        if factor == "B":
            return 0.0 if self.init_lora_weights else 1 / math.sqrt(self.r)
        if self.init == "lora_matched":
            return 1 / math.sqrt(rows) if factor == "A" else math.sqrt(3)
        # Kaiming's law with the columns for a fan-in, of slope √5 for A, √5 · init_scale for C
        return math.sqrt(6 / ((1 + 5 * (1 if factor == "A" else self.init_scale**2)) * self.r))

    def _delta(self, site: Site) -> TensorDelta:
        bank = site.shared
        assert isinstance(bank, TensorBank)
        block, roles = place(site.name, self.matrices)
        count = self._check(site, roles, bank)
        return TensorDelta(
            site.in_features, site.out_features, bank,
            parts=[(ROLES.index(role), len(bank.lora_C_head) if role in "qo" else count) for role in roles],
            layer=self._layer(site, block),
            scale=partial(scale_of, matching(self.alpha_pattern, site.name) or self.lora_alpha, rslora=self.use_rslora),
            heads_out=roles != "o" if self.orientation == "head_aligned" else self.orientation == "official_litgpt",
            name=site.name, dropout=self.lora_dropout,
        )  # fmt: skip

    def _layers(self, site: Site) -> list[str]:
        return self.layers or blocks((name for name, *_ in site.peers), self.matrices)

    def _layer(self, site: Site, block: str) -> int:
        layers = self._layers(site)
        if block in layers:
            return layers.index(block)
        raise ConfigError(
            f"{site.name}: its attention block {block} is none of `layers` ({layers[0]}, …), which were filled in for "
            f"another model: make a new config"
        )

    def _heads(self, name: str) -> tuple[int, int]:
        if self.heads is not None and self.head_dim is not None:
            return self.heads, self.head_dim
        missing = "heads" if self.heads is None else "head_dim"
        raise ConfigError(f"{name}: {missing} is not given, and no config of the model says it: set `{missing}`")

    def _check(self, site: Site, roles: str, bank: TensorBank) -> int:
        """Heads of k and of v. Raises ConfigError for a module that is no slice of the tensor."""
        (heads, head_dim), width = self._heads(site.name), len(bank.lora_A)
        read, inner = site.in_features, site.out_features
        if roles == "o":
            read, inner = inner, read
        count = key_heads(roles.replace("o", "q"), inner, heads, head_dim)
        plain = self.orientation == "head_aligned" or (heads * head_dim == width and count == heads)
        if read == width and plain and count is not None:
            return count
        if read != width:
            problem = f"width {read}, but the factor that all modules share has {width}: adapt modules of one width"
        elif count is None:
            problem = f"{inner} features are not {roles} of {heads} heads of {head_dim}: set `heads` and `head_dim`"
        else:
            problem = (
                f"orientation={self.orientation!r} wants heads · head_dim = {heads} · {head_dim} to be the width "
                f"{width}, and as many heads for k and v: use orientation='head_aligned'"
            )
        raise ConfigError(f"{site.name}: {problem}, or leave the module out of `target_modules`")
