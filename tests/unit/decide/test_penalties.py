"""The orthogonality penalty: closed form against autograd and a slow twin; T8."""

import math

import pytest
import torch
from torch import Tensor

from increlora.decide import penalties
from increlora.decide.penalties import gram_error, orthogonality, orthogonality_grad
from increlora.deltas import BlockDelta, LowRankDelta, Status, TripletDelta
from increlora.methods import Penalty
from increlora.runtime.penalty import add_penalty, penalty_value
from tests.reference import naive

FORMS = ["trainer", "squared"]
SHAPES = [(1, 4), (3, 7), (1, 4), (2, 2), (5, 3), (3, 7), (1, 1)]  # repeated, square, more rows than columns


def matrices(seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in SHAPES]


def tensor(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_t8_one_module() -> None:
    factors = [tensor([[3, 4]]), tensor([[0.6, 0.8]])]  # A and Bᵀ
    assert orthogonality(factors, form="trainer").item() == pytest.approx((24 + 0) / 2, rel=1e-14)
    assert orthogonality(factors, form="squared").item() == pytest.approx(576, rel=1e-14)


def test_t8_equal_rows_count_across_components() -> None:
    """Two equal rows: the trainer's form sees them; the published library helper, entry by entry, gives 0."""
    A, Bt = tensor([[1, 0], [1, 0]]), tensor([[1, 0], [0, 1]])
    assert orthogonality([A, Bt], form="trainer").item() == pytest.approx(math.sqrt(2) / 2, rel=1e-14)
    per_entry = [row[None] for M in (A, Bt) for row in M]
    assert orthogonality(per_entry, form="trainer").item() == 0.0


@pytest.mark.parametrize("form", FORMS)
def test_value_equals_its_twin(form) -> None:
    factors = matrices()
    assert orthogonality(factors, form=form).item() == pytest.approx(naive.orthogonality(factors, form), rel=1e-12)


def test_without_factors_the_penalty_is_zero() -> None:
    assert orthogonality([]).item() == 0.0
    assert orthogonality_grad([], weight=0.1) == []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", [0.1, 0.3, 0.0])
def test_gradient_equals_autograd(form, weight: float) -> None:
    factors = [M.requires_grad_() for M in matrices(1)]
    (weight * orthogonality(factors, form=form)).backward()
    grads = orthogonality_grad(factors, weight=weight, form=form)
    for M, grad in zip(factors, grads, strict=True):
        assert grad.shape == M.shape and not grad.requires_grad
        torch.testing.assert_close(grad, M.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_equals_a_difference_quotient_of_the_twin(form) -> None:
    factors, weight, h = matrices(2), 0.2, 1e-6
    grads = orthogonality_grad(factors, weight=weight, form=form)
    for k, (i, j) in ((1, (2, 5)), (3, (0, 1)), (4, (4, 0))):
        ends = []
        for sign in (1, -1):
            moved = [M.clone() for M in factors]
            moved[k][i, j] += sign * h
            ends.append(weight * naive.orthogonality(moved, form))
        assert grads[k][i, j].item() == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_zero_at_the_optimum(form) -> None:
    """Also in the un-squared form, whose norm has no derivative there; a neighbour of the same shape still moves."""
    off = tensor([[1, 0, 0], [0, 2, 0]])
    grads = orthogonality_grad([torch.eye(3).double()[:2], off], weight=0.1, form=form)
    assert torch.equal(grads[0], torch.zeros(2, 3).double())
    assert torch.isfinite(grads[1]).all() and grads[1].norm() > 0


@pytest.mark.parametrize("form", FORMS)
def test_equal_shapes_are_batched_and_the_order_is_kept(form, monkeypatch) -> None:
    calls: list[tuple[int, ...]] = []

    def counting(rows: Tensor) -> Tensor:
        calls.append(tuple(rows.shape))
        return gram_error(rows)

    factors = matrices(4)
    alone = [orthogonality_grad([M] * len(factors), weight=0.1, form=form)[0] for M in factors]
    monkeypatch.setattr(penalties, "gram_error", counting)
    together = orthogonality_grad(factors, weight=0.1, form=form)
    assert sorted(calls) == [(1, 1, 1), (1, 2, 2), (1, 5, 3), (2, 1, 4), (2, 3, 7)]
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_keeps_the_dtype(form) -> None:
    grads = orthogonality_grad(matrices(dtype=torch.float32), weight=0.1, form=form)
    assert {g.dtype for g in grads} == {torch.float32}
    for fast, slow in zip(grads, orthogonality_grad(matrices(), weight=0.1, form=form), strict=True):
        torch.testing.assert_close(fast.double(), slow, rtol=1e-5, atol=1e-6)


def test_gram_error_leaves_its_operand_alone() -> None:
    M = matrices()[1]
    before = M.clone()
    error = gram_error(M)
    assert torch.equal(M, before)
    assert error.norm().item() == pytest.approx(naive.gram_error_norm(M), rel=1e-13)


# ---- in a run: which matrices, and where the gradient goes


def deltas(kind: type[BlockDelta], *, learns: bool) -> list[BlockDelta]:
    """Two modules with an active, a reserve and a dormant block each."""

    def normal(shape, generator, block):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    options = {"init": dict.fromkeys("AEB", normal), "scale": lambda rank: 1.0, "dtype": torch.float64}
    made = [kind(n, m, [2, 1, 3], name=f"{n}", **options) for n, m in ((5, 4), (3, 6))]
    for delta in made:
        delta.assign(status=[Status.ACTIVE, Status.RESERVE, Status.DORMANT])
        delta.reserve_learns = learns
    return made


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("kind", [LowRankDelta, TripletDelta])
@pytest.mark.parametrize("form", FORMS)
def test_penalty_of_a_run(form, kind, learns: bool) -> None:
    """Active and reserve together make a matrix; its gradient, times the loss scale, is added to what may move."""
    modules, rule = deltas(kind, learns=learns), Penalty(0.3, form)
    rows = [torch.cat([d.block(i)[letter].detach().T if letter == "B" else d.block(i)[letter].detach() for i in (0, 1)])
            for d in modules for letter in "AB"]  # fmt: skip
    value = penalty_value(modules, rule)
    assert value.item() == pytest.approx(0.3 * naive.orthogonality(rows, form), rel=1e-12)
    value.backward()
    expected = {id(p): None if p.grad is None else p.grad.clone() for d in modules for p in d.parameters()}
    for d in modules:
        for p in d.parameters():
            p.grad = torch.ones_like(p) if any(p is q for q in d.block(0).values()) else None
    add_penalty(modules, rule, scale=8.0)
    for d in modules:
        for i in range(3):
            for letter, p in d.block(i).items():
                if letter == "E" or i == 2 or (i == 1 and not learns):
                    assert (p.grad is None) if i else torch.equal(p.grad, torch.ones_like(p)), (letter, i)
                else:
                    torch.testing.assert_close(p.grad, 8 * expected[id(p)] + (i == 0), rtol=1e-12, atol=1e-12)
