"""Fixed linear maps that shorten a vector by summing groups of its entries, and lengthen one by repeating them.

    stride   entry j belongs to group j mod R: the groups are interleaved
    block    the groups are runs, the first (n mod R) of them one entry longer

Both directions are views, sums and additions in place: no index, no copy of the longer vector, and nothing is kept for
the backward pass, since each direction is the adjoint of the other.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from ...seeding import generator_of

Layout = Literal["stride", "block"]
Pairing = Literal["half", "adjacent"]


@dataclass(frozen=True)
class Groups:
    """`size` groups of the first `used` entries of a vector; later entries belong to none.

    wrap: the first `wrap` ≤ `used` entries come once more behind the last one (stride only), so they are in two groups.
    """

    used: int
    size: int
    layout: Layout = "stride"
    wrap: int = 0

    def pieces(self) -> list[tuple[slice, tuple[int, int], int, slice]]:
        """(entries, as a matrix, its axis within a group, their groups): together they make up the map."""
        q, rest = divmod(self.used, self.size)
        if self.layout == "block":
            longer, size = rest * (q + 1), self.size
            return [
                (slice(0, longer), (rest, q + 1), -1, slice(0, rest)),
                (slice(longer, self.used), (size - rest, q), -1, slice(rest, size)),
            ]
        whole = q * self.size
        return [
            (slice(0, whole), (q, self.size), -2, slice(0, self.size)),
            (slice(whole, self.used), (1, rest), -2, slice(0, rest)),
            (slice(0, self.wrap), (1, self.wrap), -2, slice(rest, rest + self.wrap)),
        ]

    def sums(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Sum of each group, (…, size) in `dtype`, of x (…, at least used)."""
        z: Tensor | None = None
        for entries, matrix, axis, groups in self.pieces():
            if matrix[0] * matrix[1] == 0:
                continue
            part = x[..., entries].unflatten(-1, matrix).sum(axis, dtype=dtype)
            if z is None and part.shape[-1] == self.size:
                z = part
                continue
            z = x.new_zeros((*x.shape[:-1], self.size), dtype=dtype) if z is None else z
            z[..., groups] += part
        assert z is not None
        return z

    def add_repeated(self, y: Tensor, h: Tensor) -> Tensor:
        """y, to each entry of which the value h (…, size) of its group was added in place."""
        for entries, matrix, axis, groups in self.pieces():
            if matrix[0] * matrix[1]:
                y[..., entries].unflatten(-1, matrix).add_(h[..., groups].unsqueeze(axis))
        return y


class Shorten(torch.autograd.Function):
    """Sums of groups, (…, n) → (…, size)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: Groups, dtype: torch.dtype) -> Tensor:
        ctx.groups, ctx.shape, ctx.dtype = groups, x.shape, x.dtype
        return groups.sums(x, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.groups.add_repeated(grad.new_zeros(ctx.shape, dtype=ctx.dtype), grad), None, None


class Lengthen(torch.autograd.Function):
    """y plus the repeated values h, (…, n) and (…, size) → (…, n)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, groups: Groups) -> Tensor:
        ctx.groups, ctx.dtype = groups, h.dtype
        return groups.add_repeated(y.clone(), h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, ctx.groups.sums(grad, ctx.dtype), None


class Rotate(torch.autograd.Function):
    """Chunk b of z (…, chunks, size) turned by the angles b · θ_j, θ_j = 10000^(−2j/size), one for each pair of
    entries: (j, j + size/2) if `half`, (2j, 2j + 1) if `adjacent`. The adjoint turns back."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, pairing: Pairing) -> Tensor:
        ctx.pairing = pairing
        return rotated(z, pairing, back=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return rotated(grad, ctx.pairing, back=True), None


def rotated(z: Tensor, pairing: Pairing, *, back: bool) -> Tensor:
    cos, sin = angles(z.shape[-2], z.shape[-1], z.device, z.dtype == torch.float64)
    out = torch.empty_like(z)
    (a, b), (u, v) = pairs(z, pairing), pairs(out, pairing)
    sin = -sin if back else sin
    u.copy_(a * cos - b * sin)
    v.copy_(b * cos + a * sin)
    return out


def pairs(z: Tensor, pairing: Pairing) -> tuple[Tensor, Tensor]:
    """First and second entries of all pairs, as views."""
    half = z.shape[-1] // 2
    return (z[..., :half], z[..., half:]) if pairing == "half" else (z[..., 0::2], z[..., 1::2])


# Kept for all modules at once, by what they depend on: attributes of a module would not follow it to another device,
# buffers would be rounded by `model.half()`.


@lru_cache(maxsize=256)
def angles(chunks: int, size: int, device: torch.device, double: bool) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles (chunks, size/2), rounded once: float32, or float64 if `double`."""
    theta = 10000.0 ** (-2 * torch.arange(size // 2, dtype=torch.float64) / size)
    angle = torch.outer(torch.arange(chunks, dtype=torch.float64), theta)
    dtype = torch.float64 if double else torch.float32
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


@lru_cache(maxsize=1024)
def shuffled(key: str, length: int, device: torch.device) -> Tensor:
    """A permutation of 0 … length − 1, the same on every machine for the same key."""
    with torch.inference_mode(False):  # a backward pass could not use it otherwise
        return torch.randperm(length, generator=generator_of(f"{key}/{length}")).to(device)
