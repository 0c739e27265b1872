"""LoRA-Mini's formulas and options: the hand-computed cases of the specification (T1 to T12), and every refusal."""

import copy
import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from increlora.methods import PlainLora, Site
from increlora.structural.lora_mini.delta import FourFactorDelta, composing_pays, digest
from increlora.structural.lora_mini.method import LoraMini
from tests.reference.naive_lora_mini import NaiveMini

# in, out, a, b, r: wider, narrower, square, inner sizes below and above each other, and odd
SHAPES = [(12, 20, 8, 10, 3), (20, 12, 9, 7, 2), (8, 8, 8, 8, 4), (7, 13, 5, 11, 2), (5, 3, 2, 2, 1)]
NARROW = [(12, 20, 3, 10, 6), (20, 12, 9, 2, 4), (9, 9, 2, 2, 3), (8, 6, 2, 3, 5)]  # a or b below r
PATHS = ["composed", "sequential", "auto"]


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def delta_of(config: LoraMini, in_features: int, out_features: int, **site) -> FourFactorDelta:
    place = {"name": "layer.3.value", "dtype": torch.float64} | site
    ends = in_features, out_features
    made = config.method(1, sum(ends)).make_delta(
        Site(place.pop("name"), *ends, 1, sum(ends), place["dtype"]),
    )  # fmt: skip
    assert isinstance(made, FourFactorDelta)
    return made


@pytest.fixture(autouse=True)
def sizes_as_they_are():
    """Tiny shapes are often ones that the library warns of; the warnings have their own tests."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* and modules like it: ", UserWarning)
        yield


def random(m: int, n: int, a: int, b: int, r: int, **options) -> FourFactorDelta:
    chosen = {"r": r, "inner_in": a, "inner_out": b, "lora_alpha": 5, "init_lora_weights": False, "seed": 1}
    delta = delta_of(LoraMini(**chosen | options), m, n)
    with torch.no_grad():
        delta.lora_B0.mul_(30)
    return delta


def filled(A_aux, A, B, B_aux, scale: float = 1.0, **options) -> FourFactorDelta:
    A_aux, A, B, B_aux = map(tensor, (A_aux, A, B, B_aux))
    chosen = {"r": len(A), "inner_in": len(A_aux), "inner_out": len(B), "lora_alpha": scale * len(A)} | options
    delta = delta_of(LoraMini(**chosen), A_aux.shape[1], B_aux.shape[0])
    for buffer, values in ((delta.lora_aux_A, A_aux), (delta.lora_aux_B, B_aux)):
        buffer.copy_(values)
    with torch.no_grad():
        delta.lora_A0.copy_(A)
        delta.lora_B0.copy_(B)
    return delta


def worked_example(A=((1, 2),), B=((1,), (-1,)), **options) -> FourFactorDelta:
    return filled([[1, 0, 1], [0, 1, 0]], A, B, [[1, 0], [1, 1]], 2, **options)


def twin_of(delta: FourFactorDelta, linear: nn.Linear | None = None) -> NaiveMini:
    linear = linear or nn.Linear(delta.in_features, delta.out_features, dtype=torch.float64)
    factors = delta.lora_aux_A, delta.lora_A0, delta.lora_B0, delta.lora_aux_B
    return NaiveMini(linear, delta.scale * len(delta.lora_A0), *factors)


def batch(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def same(one: Tensor, other: Tensor, tolerance: float = 1e-13) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# ---- the hand cases


@pytest.mark.parametrize("path", PATHS)
def test_t1_forward(path: str) -> None:
    delta = worked_example(forward=path)
    assert delta(tensor([[1, 1, 1]])).tolist() == [[8, 0]]
    assert delta.weight().tolist() == [[2, 4, 2], [0, 0, 0]]
    A, B = delta.factors()
    assert (A.tolist(), B.tolist()) == ([[2, 4, 2]], [[1], [0]])  # s = 2 is in A


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("changes", "gA", "gB", "gx"), [
    ({}, [[4, 2]], [[16], [8]], [2, 4, 2]),
    ({"B": [[0], [0]]}, [[0, 0]], [[16], [8]], [0, 0, 0]),
    ({"A": [[0, 0]]}, [[4, 2]], [[0], [0]], [0, 0, 0]),
    ({"A": [[0, 0]], "B": [[0], [0]]}, [[0, 0]], [[0], [0]], [0, 0, 0]),
])  # fmt: skip
def test_t2_gradients_of_the_sum_of_outputs(path: str, changes: dict, gA, gB, gx) -> None:
    delta, x = worked_example(**changes, forward=path), tensor([[1, 1, 1]]).requires_grad_()
    delta(x).sum().backward()
    assert (delta.lora_A0.grad.tolist(), delta.lora_B0.grad.tolist(), x.grad.tolist()) == (gA, gB, [gx])


def test_t3_counts_of_the_worked_example() -> None:
    delta = worked_example()
    assert sum(p.numel() for p in delta.parameters()) == 4
    assert delta.lora_aux_A.numel() + delta.lora_aux_B.numel() == 10
    assert PlainLora(r=1).method(1, 5).budget.parameters == 5


@pytest.mark.parametrize(("d", "inner", "r", "trained", "lora", "direct", "frozen"), [
    (768, 32, 8, 512, 12_288, 1_024, 49_152), (768, 38, 8, 608, 12_288, 1_444, 58_368),
    (1024, 51, 8, 816, 16_384, 2_601, 104_448), (1024, 64, 8, 1_024, 16_384, 4_096, 131_072),
    (4096, 128, 8, 2_048, 65_536, 16_384, 1_048_576), (4096, 205, 8, 3_280, 65_536, 42_025, 1_679_360),
])  # fmt: skip
def test_t3_counts_of_the_table(d: int, inner: int, r: int, trained, lora, direct, frozen) -> None:
    delta = delta_of(LoraMini(r=r, inner_in=inner, inner_out=inner), d, d, dtype=torch.bfloat16)
    assert sum(p.numel() for p in delta.parameters()) == trained == r * 2 * inner
    assert delta.lora_aux_A.numel() + delta.lora_aux_B.numel() == frozen
    assert LoraMini(r=r).method(1, 2 * d).budget.parameters == lora and inner**2 == direct


@pytest.mark.parametrize(("m", "n"), [(6, 9), (9, 6), (7, 7)])
@pytest.mark.parametrize("path", PATHS)
def test_t4_identities_outside_are_plain_lora(m: int, n: int, path: str) -> None:
    mini = random(m, n, m, n, 3, forward=path)
    mini.lora_aux_A.copy_(torch.eye(m))
    mini.lora_aux_B.copy_(torch.eye(n))
    lora = PlainLora(r=3, lora_alpha=5).method(1, m + n).make_delta(Site("x", m, n, 1, m + n, torch.float64))
    lora.load_state_dict(
        {"lora_A0": mini.lora_A0, "lora_B0": mini.lora_B0, "lora_state": mini.lora_state}, strict=False
    )
    optimizers = [torch.optim.AdamW(d.parameters(), lr=0.01) for d in (mini, lora)]
    for step in range(60):
        x = batch(4, m) * math.cos(step)
        for delta, optimizer in zip((mini, lora), optimizers, strict=True):
            delta(x).tanh().sub(1).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    same(mini.lora_A0, lora.lora_A0, 1e-11)
    same(mini.weight(), lora.weight(), 1e-11)


@pytest.mark.parametrize(("a", "b", "r", "rank"), [(3, 4, 6, 3), (4, 2, 6, 2), (5, 5, 4, 4)])
def test_t5_the_rank_is_that_of_the_narrowest_place(a: int, b: int, r: int, rank: int) -> None:
    delta = random(16, 12, a, b, r)
    assert int(torch.linalg.matrix_rank(delta.weight())) == rank
    assert delta.factors()[0].shape == (rank, 16) and delta.factors()[1].shape == (12, rank) and delta.rank == r


def test_t6_the_inner_pair_has_a_gauge() -> None:
    delta = random(12, 20, 8, 10, 3)
    before, S = delta.weight().detach(), batch(3, 3) + 3 * torch.eye(3)
    with torch.no_grad():
        delta.lora_A0.copy_(S @ delta.lora_A0)
        delta.lora_B0.copy_(delta.lora_B0 @ torch.linalg.inv(S))
    same(delta.weight(), before, 1e-12)


# ---- one formula, every way to it


@pytest.mark.parametrize("shape", SHAPES + NARROW)
@pytest.mark.parametrize("lead", [(7,), (2, 5), (), (2, 2, 3), (0,)])
def test_t7_every_way_agrees_with_the_naive_one(shape: tuple[int, ...], lead: tuple[int, ...]) -> None:
    found = {}
    for path in [*PATHS, "merged", "naive"]:
        delta = random(*shape, forward=path if path in PATHS else "auto")
        linear = nn.Linear(*shape[:2], dtype=torch.float64).requires_grad_(False)
        nn.init.ones_(linear.weight), nn.init.ones_(linear.bias)
        x, g = batch(*lead, shape[0]).requires_grad_(), batch(*lead, shape[1])
        twin = twin_of(delta, linear)
        if path == "naive":
            y, trained = twin(x), [twin.A, twin.B]
        elif path == "merged":
            A, B = delta.factors()
            y, trained = linear(x) + x @ A.T @ B.T, list(delta.parameters())
        else:
            y, trained = delta.add_to(linear(x), x), list(delta.parameters())
        found[path] = [y, *torch.autograd.grad((y * g).sum(), [x, *trained])]
        same(delta.weight(), twin.delta_weight())
    for path in found:
        for one, other in zip(found[path], found["naive"], strict=True):
            same(one, other, 1e-12)


@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("path", PATHS)
def test_gradcheck(shape: tuple[int, ...], path: str) -> None:
    delta = random(*shape, forward=path)
    names, values = zip(*((n, p.detach().clone().requires_grad_()) for n, p in delta.named_parameters()), strict=True)

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(delta, dict(zip(names, parameters, strict=True)), (x,))

    inputs = (batch(3, shape[0]).requires_grad_(), *values)
    assert torch.autograd.gradcheck(call, inputs) and torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("path", PATHS)
def test_every_trained_factor_tells_the_same_sum(path: str) -> None:
    """⟨A, ∂A⟩ = ⟨B, ∂B⟩ = ⟨ΔW, G⟩."""
    delta, x, D = random(*SHAPES[0], forward=path), batch(6, 12), batch(6, 20)
    delta(x).backward(D)
    for p in delta.parameters():
        same((p * p.grad).sum(), (delta.weight() * (D.T @ x)).sum(), 1e-11)


@pytest.mark.parametrize(("d", "inner", "r", "tokens"), [(768, 64, 8, 10), (4096, 128, 16, 19), (1024, 32, 4, 5)])
def test_composing_pays_from_the_published_number_of_tokens_on(d: int, inner: int, r: int, tokens: int) -> None:
    pays = [composing_pays(n, r, (inner, inner), (d, d)) for n in range(200)]
    assert pays.index(True) == tokens and all(pays[tokens:])


@pytest.mark.parametrize("shape", SHAPES + NARROW)
def test_composing_pays_where_counted_products_say_so(shape: tuple[int, ...]) -> None:
    m, n, a, b, r = shape
    for tokens in range(40):
        sequential = [(tokens, m, a), (tokens, a, r), (tokens, r, b), (tokens, b, n)]
        composed = [(r, a, m), (n, b, r), (tokens, m, r), (tokens, r, n)]
        counts = [sum(i * j * k for i, j, k in products) for products in (sequential, composed)]
        assert composing_pays(tokens, r, (a, b), (m, n)) == (counts[1] <= counts[0])


def test_auto_takes_the_cheaper_way(monkeypatch: pytest.MonkeyPatch) -> None:
    delta, ways = random(40, 60, 20, 20, 2), []
    composed = FourFactorDelta._composed
    monkeypatch.setattr(FourFactorDelta, "_composed", lambda *given: ways.append("composed") or composed(*given))
    first = next(n for n in range(99) if composing_pays(n, 2, (20, 20), (40, 60)))
    for lead, expected in (((first - 1,), []), ((first,), ["composed"]), ((2, first), ["composed"]), ((), [])):
        ways.clear()
        delta(batch(*lead, 40))
        assert ways == expected


# ---- what autograd keeps (T12)


class Kept:
    """Sizes of the tensors that autograd keeps for the backward pass, and how many bytes beside what was there."""

    def __init__(self, *known: Tensor) -> None:
        self.storages = {t.untyped_storage().data_ptr() for t in known}
        self.shapes: list[tuple[int, ...]] = []
        self.new: list[Tensor] = []

    def __enter__(self) -> "Kept":
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self.hooks.__exit__(*exception)

    def pack(self, t: Tensor) -> Tensor:
        self.shapes.append(tuple(t.shape))
        if t.untyped_storage().data_ptr() not in self.storages:
            self.new.append(t)
        return t


@pytest.mark.parametrize("dtypes", [
    (torch.float64, torch.float64), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16),
])  # fmt: skip
def test_t12_the_lean_way_keeps_nothing_of_the_size_of_the_input(dtypes: tuple[torch.dtype, ...]) -> None:
    """Nor a copy of a frozen factor in another dtype."""
    m, n, a, b, r, tokens = 96, 80, 8, 6, 3, 500
    inner, outer = dtypes
    grads = []
    for path in ("sequential", "composed"):
        delta = random(m, n, a, b, r, forward=path).to(inner)
        for letter in "AB":
            setattr(delta, f"lora_aux_{letter}", getattr(delta, f"lora_aux_{letter}").to(outer))
        x = batch(tokens, m).to(outer).requires_grad_()
        y = torch.zeros(tokens, n, dtype=outer)
        with Kept(x, *delta.parameters(), *delta.buffers()) as kept:
            result = delta.add_to(y, x)
        sizes = [math.prod(shape) for shape in kept.shapes]
        if path == "sequential":
            assert max(sizes) == tokens * a and (tokens, m) not in kept.shapes
            assert max(t.numel() for t in kept.new) == tokens * a
        else:
            assert (tokens, m) in kept.shapes
        copies = [t for t in kept.new if t.numel() in (a * m, b * n)]
        assert not copies
        result.float().square().sum().backward()
        grads.append([p.grad.double() for p in (*delta.parameters(), x)])
    tolerance = {torch.float64: 1e-12, torch.float32: 0.02, torch.bfloat16: 0.06}[inner]
    for one, other in zip(*grads, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


def test_t12_dropout_keeps_its_mask() -> None:
    delta, x = random(96, 80, 8, 6, 3, forward="sequential", lora_dropout=0.5), batch(500, 96).requires_grad_()
    with Kept(x) as kept:
        delta(x)
    assert (500, 96) in kept.shapes


@pytest.mark.parametrize("path", PATHS)
def test_dropout_acts_on_the_input_while_training(path: str) -> None:
    delta, x = random(*SHAPES[0], lora_dropout=0.5, forward=path), batch(64, 12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mask = torch.empty(64, 12).bernoulli_(0.5) * 2
        torch.manual_seed(0)
        y = delta(x)
    dense = twin_of(delta).delta_weight()
    same(y, (x * mask) @ dense.T, 1e-12)
    same(delta.eval()(x), x @ dense.T, 1e-12)


# ---- the frozen factors (T8)


def test_t8_they_are_no_parameters_and_never_move() -> None:
    delta = random(*SHAPES[0])
    assert [n for n, _ in delta.named_parameters()] == ["lora_A0", "lora_B0"]
    assert [n for n, _ in delta.named_buffers()][1:] == ["lora_aux_A", "lora_aux_B", "lora_digest"]
    before = {n: t.clone() for n, t in delta.named_buffers()}
    delta.requires_grad_(True)
    optimizer = torch.optim.AdamW(delta.parameters(), lr=0.1, weight_decay=0.5)
    for step in range(20):
        delta(batch(5, 12)).sub(step).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(t, before[n]) and not t.requires_grad for n, t in delta.named_buffers())
    assert not torch.equal(delta.lora_A0, random(*SHAPES[0]).lora_A0)


def outer(delta: FourFactorDelta) -> list[Tensor]:
    return [delta.lora_aux_A, delta.lora_aux_B]


def test_t8_module_and_seed_make_them_alone() -> None:
    def draw(**changes) -> FourFactorDelta:
        options = {"r": 2, "inner_in": 6, "inner_out": 6, "seed": 3} | changes
        name = options.pop("name", "layer.0.query")
        return delta_of(LoraMini(**options), 12, 20, name=name)

    first = draw()
    torch.manual_seed(99)
    torch.rand(5)
    for alike in (draw(), draw(r=4), draw(forward="sequential"), draw(save_projection=False), draw(lora_alpha=1)):
        assert all(map(torch.equal, outer(alike), outer(first))) and torch.equal(alike.lora_digest, first.lora_digest)
    for other in (draw(seed=4), draw(name="layer.1.query"), draw(init="official_aux"), draw(inner_in=5)):
        assert not torch.equal(other.lora_digest, first.lora_digest)
    assert not torch.equal(draw(seed=4).lora_aux_A, first.lora_aux_A)
    assert not torch.equal(draw(name="layer.1.query").lora_aux_B, first.lora_aux_B)


@pytest.mark.parametrize("init", ["matched", "official_aux", "orthonormal"])
def test_t8_every_dtype_holds_the_same_numbers(init: str) -> None:
    """The rounding at the draw: float16 loses no tiny value, bfloat16 no digit; so one digest serves them all."""
    config = LoraMini(r=8, inner_in=64, inner_out=32, init=init)
    deltas = {d: delta_of(config, 512, 768, dtype=d)
              for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}  # fmt: skip
    expected = outer(deltas[torch.float64])
    for dtype, delta in deltas.items():
        assert all(t.dtype == dtype for t in outer(delta))
        assert all(map(torch.equal, [t.double() for t in outer(delta)], expected))
        assert bytes(delta.lora_digest.tolist()) == digest(*expected) == delta.drawn
        for cast in (copy.deepcopy(delta).half(), copy.deepcopy(delta).bfloat16(), copy.deepcopy(delta).float()):
            assert digest(*outer(cast)) == delta.drawn and cast.lora_digest.dtype == torch.uint8
    tiny = [t[t != 0].abs().min() for t in expected]
    assert init == "orthonormal" or min(tiny) < 2**-14  # where float16 has fewer digits than bfloat16


def test_t8_the_default_dtype_of_torch_changes_nothing() -> None:
    made = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            made += [
                delta_of(LoraMini(r=2, inner_in=6, inner_out=6, init=i), 12, 20) for i in ("matched", "orthonormal")
            ]
        finally:
            torch.set_default_dtype(torch.float32)
    for one in made[2:]:
        assert any(torch.equal(one.lora_digest, first.lora_digest) for first in made[:2])


def test_the_digest_tells_every_change() -> None:
    delta = random(*SHAPES[0])
    A_aux, B_aux = outer(delta)
    known = [delta.drawn]
    for changed in (
        (A_aux.flip(0), B_aux), (A_aux, B_aux.flip(1)), (B_aux, A_aux), (A_aux * (1 + 2**-7), B_aux),
        (A_aux, torch.where(torch.arange(B_aux.numel()).view_as(B_aux) == 3, -B_aux, B_aux)),
    ):  # fmt: skip
        found = digest(*changed)
        assert len(found) == 16 and found not in known
        known.append(found)
    assert digest(A_aux.t().contiguous().t(), B_aux) == delta.drawn  # strides are no values
