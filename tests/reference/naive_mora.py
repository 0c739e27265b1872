"""MoRA by loops over single entries, as the specification words it: slow, and without any of the library's code."""

import math
from functools import cache

import torch
from torch import Tensor

Vector = list[float]

# published number → groups of inputs, groups of outputs
TYPES = {1: ("stride", "stride"), 2: ("block", "block"), 3: ("block", "stride"), 4: ("stride", "block")}


def group(layout: str, j: int, length: int, side: int) -> int:
    """Group of entry j among `side` groups of `length` entries."""
    if layout == "stride":
        return j % side
    q, rest = divmod(length, side)
    runs = [q + 1] * rest + [q] * (side - rest)
    number = 0
    while j >= runs[number]:
        j -= runs[number]
        number += 1
    return number


def sharing(
    M: Tensor,
    in_features: int,
    out_features: int,
    *,
    compress: str = "stride",
    expand: str = "stride",
    wrap: bool = True,
) -> Tensor:
    """ΔW[i, j] = M[g'(i), g(j)], and the first inputs once more where they fill the gap at the end."""
    side = len(M)
    weight = torch.zeros(out_features, in_features, dtype=M.dtype)
    gap = -in_features % side if compress == "stride" and wrap else 0
    for i in range(out_features):
        row = group(expand, i, out_features, side)
        for j in range(in_features):
            weight[i, j] = M[row, group(compress, j, in_features, side)]
            if j < gap:
                weight[i, j] += M[row, (in_features + j) % side]
    return weight


def truncation(M: Tensor, in_features: int, out_features: int) -> Tensor:
    """M in the corner."""
    weight = torch.zeros(out_features, in_features, dtype=M.dtype)
    for i in range(min(len(M), out_features)):
        for j in range(min(len(M), in_features)):
            weight[i, j] = M[i, j]
    return weight


def turned(chunk: Vector, b: int, pairing: str) -> Vector:
    """Chunk number b with its pairs of entries turned by b θ_j."""
    half, out = len(chunk) // 2, list(chunk)
    for j in range(half):
        one, other = (j, j + half) if pairing == "half" else (2 * j, 2 * j + 1)
        angle = b * 10000 ** (-2 * j / len(chunk))
        out[one] = chunk[one] * math.cos(angle) - chunk[other] * math.sin(angle)
        out[other] = chunk[other] * math.cos(angle) + chunk[one] * math.sin(angle)
    return out


def chunks(
    M: Tensor,
    x: Vector,
    out_features: int,
    *,
    rotate: bool,
    pairing: str = "half",
    wrap: bool = True,
    fold: bool = False,
) -> Vector:
    """y for one x: all chunks are computed, as the published code does, and cut or tiled to the length of y."""
    side = len(M)
    missing = -len(x) % side
    padded = x + (x[:missing] if wrap else [0.0] * missing)
    results = []
    for b in range(len(padded) // side):
        chunk = padded[b * side : (b + 1) * side]
        chunk = turned(chunk, b, pairing) if rotate else chunk
        results.append([sum(float(M[i, u]) * chunk[u] for u in range(side)) for i in range(side)])
    places = math.ceil(out_features / side)
    if fold and len(results) > places:
        for b, result in enumerate(results[places:], start=places):
            results[b % places] = [one + other for one, other in zip(results[b % places], result, strict=True)]
        results = results[:places]
    flat = [value for result in results for value in result]
    return [flat[i % len(flat)] for i in range(out_features)]


def chunked(M: Tensor, in_features: int, out_features: int, **options) -> Tensor:
    columns = []
    for j in range(in_features):
        x = [0.0] * in_features
        x[j] = 1.0
        columns.append(chunks(M, x, out_features, **options))
    return torch.tensor(columns, dtype=M.dtype).T


def dense(operator: str, M: Tensor, in_features: int, out_features: int, **options) -> Tensor:
    """ΔW (out, in)."""
    M = M.detach()
    if operator == "sharing":
        return sharing(M, in_features, out_features, **options)
    if operator == "truncation":
        return truncation(M, in_features, out_features)
    return chunked(M, in_features, out_features, rotate=operator == "rotation", **options)


@cache
def linear_map(operator: str, side: int, in_features: int, out_features: int, **options) -> Tensor:
    """(out, in, R, R): ΔW is its product with M, so that M can be trained."""
    found = torch.zeros(out_features, in_features, side, side, dtype=torch.float64)
    for i in range(side):
        for j in range(side):
            M = torch.zeros(side, side, dtype=torch.float64)
            M[i, j] = 1
            found[:, :, i, j] = dense(operator, M, in_features, out_features, **options)
    return found
