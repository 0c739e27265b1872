"""Slow twins: every formula of the numerical core again, as plain Python loops over floats.

They share no code with the library and use no tensor arithmetic; what they cost does not matter.
"""

import math
from collections.abc import Sequence
from itertools import combinations, product

from torch import Tensor

from increlora.decide.allocation import Holding

Matrix = list[list[float]]


def rows(tensor: Tensor) -> Matrix:
    return [[float(v) for v in row] for row in tensor.detach()]


def matmul(left: Matrix, right: Matrix) -> Matrix:
    inner = range(len(right))
    return [[sum(row[k] * right[k][j] for k in inner) for j in range(len(right[0]))] for row in left]


def transposed(matrix: Matrix) -> Matrix:
    return [list(column) for column in zip(*matrix, strict=True)]


# ---- scores


def delta_sensitivity(A: Tensor, B: Tensor, X: Tensor, D: Tensor, *, norm: str) -> float:
    """Σ_ij |ΔW_ij · G_ij| / {√(mn), mn, 1}, entry by entry; ΔW = B A, G = Dᵀ X."""
    a, b, x, d = rows(A), rows(B), rows(X), rows(D)
    m, n = len(b), len(a[0])
    total = 0.0
    for i in range(m):
        for j in range(n):
            weight = sum(b[i][c] * a[c][j] for c in range(len(a)))
            gradient = sum(d[t][i] * x[t][j] for t in range(len(x)))
            total += abs(weight * gradient)
    return total / {"sqrt_numel": math.sqrt(m * n), "mean": m * n, "sum": 1}[norm]


def signed_sensitivity(dW: Tensor, G: Tensor) -> float:
    """|Σ_ij ΔW_ij G_ij|, from the dense matrices."""
    return abs(sum(w * g for w_row, g_row in zip(rows(dW), rows(G), strict=True) for w, g in zip(w_row, g_row)))


def smooth(
    sensitivity: Sequence[float], uncertainty: Sequence[float], score: Sequence[float], b1: float, b2: float
) -> tuple[list[float], list[float]]:
    """I ← b1 I + (1 − b1) S, then U ← b2 U + (1 − b2)|I − S|, module by module; a non-finite S is left out."""
    pairs = []
    for i, u, s in zip(sensitivity, uncertainty, score, strict=True):
        if math.isfinite(s):
            i = b1 * i + (1 - b1) * s
            u = b2 * u + (1 - b2) * abs(i - s)
        pairs.append((i, u))
    return [i for i, _ in pairs], [u for _, u in pairs]


# ---- penalties


def gram_error_norm(matrix: Tensor) -> float:
    """‖M Mᵀ − I‖_F."""
    m = rows(matrix)
    gram = matmul(m, transposed(m))
    return math.sqrt(sum((gram[i][j] - (i == j)) ** 2 for i in range(len(m)) for j in range(len(m))))


def orthogonality(factors: Sequence[Tensor], form: str) -> float:
    norms = [gram_error_norm(M) for M in factors]
    if form == "squared":
        return sum(norm**2 for norm in norms)
    return sum(norms) / len(norms) if norms else 0.0


# ---- schedules


def event_steps(warmup: int, interval: int, stop: int) -> list[int]:
    """All multiples of `interval` strictly above `warmup`, below `stop`, by trying every one."""
    return [k * interval for k in range(stop + 1) if warmup < k * interval < stop]


def linear_clock(step: int, created: int, warmup: int, total: int) -> float:
    """Specification, section 4, as written there (c = created, g = step)."""
    if step == created:
        return 1.0
    s, R = step - created - 1, total - created - 1
    if s < warmup:
        return s / max(1, warmup)
    return max(0.0, (R - s) / max(1, R - warmup))


# ---- selection


def cheapest_cover(holdings: Sequence[Holding], ranks: int) -> int | None:
    """Fewest parameters for exactly `ranks` more ranks, over every subset of the free blocks."""
    blocks = [(size, size * h.cost) for h in holdings for size in h.free]
    best: int | None = None
    for taken in product((False, True), repeat=len(blocks)):
        chosen = [block for block, take in zip(blocks, taken, strict=True) if take]
        if sum(size for size, _ in chosen) == ranks:
            cost = sum(cost for _, cost in chosen)
            best = cost if best is None else min(best, cost)
    return best


def chosen_published(importance: Sequence[float], used: int, target: int, top_h: int) -> list[int]:
    """Modules whose score is at or above the k-th largest, k = min(top_h, target − used): ties all grow."""
    count = min(top_h, target - used, len(importance))
    ranked = sorted(importance, reverse=True)
    return [i for i in range(len(importance)) if sum(v > importance[i] for v in ranked) < count]


def keep_top(
    scores: Sequence[Sequence[float]], costs: Sequence[int], ranks: int, parameters: int | None
) -> list[list[bool]]:
    """Take ranks from the best down; before each, try every way to complete the choice within the bound."""
    order = sorted((-s, i, j) for i, row in enumerate(scores) for j, s in enumerate(row))
    taken: list[tuple[int, int]] = []
    for place, (_, i, j) in enumerate(order):
        spent, missing = sum(costs[k] for k, _ in taken) + costs[i], ranks - len(taken) - 1
        rest = [costs[k] for _, k, _ in order[place + 1 :]]
        ways = combinations(rest, missing) if missing >= 0 else ()
        if any(parameters is None or spent + sum(way) <= parameters for way in ways):
            taken.append((i, j))
    return [[(i, j) in taken for j in range(len(row))] for i, row in enumerate(scores)]
