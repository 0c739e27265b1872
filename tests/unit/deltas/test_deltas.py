"""Deltas: their gradients, their blocks, what growth moves and what it must not. T1, T13."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from increlora.deltas import BlockDelta, LowRankDelta, Status, TripletDelta
from increlora.methods import PlainLora, Site
from increlora.methods.increlora_paper import IncreLoraPaper
from increlora.methods.initial import gaussian, kaiming, ones, zeros
from tests.switches import settings_of

DORMANT, RESERVE, ACTIVE, RETIRED = Status
KINDS = [LowRankDelta, TripletDelta]
SHAPES = [(5, 3), (3, 5), (4, 4), (1, 6)]  # in, out: the scale is folded into the smaller factor
STATES = [[ACTIVE, DORMANT, DORMANT], [ACTIVE, RESERVE, DORMANT], [ACTIVE, ACTIVE, RESERVE], [ACTIVE, RETIRED, ACTIVE]]


def normal(shape: tuple[int, int], generator: torch.Generator, block: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def build(
    kind: type[BlockDelta],
    states: Sequence[Status] = (ACTIVE,),
    *,
    shape: tuple[int, int] = (5, 3),
    sizes: Sequence[int] = (2, 1, 3),
    dtype: torch.dtype = torch.float64,
    reserve_learns: bool = True,
    **options,
) -> BlockDelta:
    """A delta of random blocks in the given states, scale 3 / (rank + 1)."""
    options = {"init": dict.fromkeys("AEB", normal), "scale": lambda rank: 3 / (rank + 1)} | options
    delta = kind(*shape, sizes[: len(states)], dtype=dtype, **options)
    delta.assign(status=list(states))
    delta.reserve_learns = reserve_learns
    return delta


def dense(delta: BlockDelta) -> Tensor:
    """ΔW block by block; e of a reserve as a constant."""
    total = delta.block(0)["A"].new_zeros(delta.out_features, delta.in_features)
    for i in delta.indices(ACTIVE, RESERVE) if delta.reserve_learns else delta.indices(ACTIVE):
        block = delta.block(i)
        e = block.get("E", total.new_ones(delta.sizes[i], 1))
        e = e.detach() if delta.state.status[i] == RESERVE else e
        total = total + delta.scale * block["B"] @ torch.diag(e[:, 0]) @ block["A"]
    return total


def batch(delta: BlockDelta, *lead: int, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*lead, delta.in_features, generator=generator, dtype=torch.float64)


# ---- one formula, three ways to it


@pytest.mark.parametrize("states", STATES, ids=lambda s: "-".join(x.name.lower() for x in s))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("learns", [True, False])
def test_t13_factorised_equals_dense(kind, shape, states, learns: bool) -> None:
    """Output and all gradients, to 1e-12 in float64."""
    delta = build(kind, states, shape=shape, reserve_learns=learns)
    x = batch(delta, 2, 7).requires_grad_()
    target = torch.linspace(-1, 1, 2 * 7 * shape[1], dtype=torch.float64).view(2, 7, shape[1])
    found = {}
    for name, y in (("factorised", delta(x)), ("dense", x @ dense(delta).T)):
        inputs = [x, *(p for i in delta.live for p in delta.block(i).values())]
        found[name] = y, torch.autograd.grad((y * target).sum(), inputs, allow_unused=True)
    torch.testing.assert_close(found["factorised"][0], found["dense"][0], rtol=1e-12, atol=1e-12)
    for fast, slow in zip(found["factorised"][1], found["dense"][1], strict=True):
        assert (fast is None) == (slow is None)
        if fast is not None:
            torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("states", STATES, ids=lambda s: "-".join(x.name.lower() for x in s))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, shape, states) -> None:
    delta = build(kind, states, shape=shape)
    still = {id(p) for p in delta.frozen_parameters()}
    names = [n for n, p in delta.named_parameters() if id(p) not in still]
    values = [p.detach().clone().requires_grad_() for n, p in delta.named_parameters() if n in names]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(delta, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (batch(delta, 4).requires_grad_(), *values))


def test_autocast_does_not_round_the_triplets() -> None:
    delta, found = build(TripletDelta, [ACTIVE, ACTIVE], dtype=torch.float32), {}
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            A, _ = delta.factors()
        found[enabled] = A, *torch.autograd.grad(A.sum(), [delta.lora_A0, delta.lora_E1])
    torch.testing.assert_close(found[True], found[False], rtol=0, atol=0)


@pytest.mark.parametrize("states", STATES, ids=lambda s: "-".join(x.name.lower() for x in s))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_map_of_the_identity_is_the_transposed_weight(kind, shape, states) -> None:
    delta = build(kind, states, shape=shape)
    identity = torch.eye(shape[0], dtype=torch.float64)
    torch.testing.assert_close(delta(identity), delta.weight().T, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(delta.weight(), dense(delta), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_add_to_adds_and_keeps_the_hosts_dtype(kind) -> None:
    delta = build(kind, [ACTIVE, ACTIVE], dtype=torch.float32)
    x, y = batch(delta, 3, 2).float(), torch.ones(3, 2, 3)
    expected = 1 + x @ dense(delta).T
    torch.testing.assert_close(delta.add_to(y.clone(), x), expected)
    half = delta.add_to(y.bfloat16(), x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("states", [[DORMANT, DORMANT], [RESERVE, DORMANT]])
def test_without_a_live_block_nothing_is_added(kind, states) -> None:
    delta = build(kind, states, reserve_learns=False)
    assert delta.rank == 0
    y = torch.ones(2, 3, dtype=torch.float64)
    assert torch.equal(delta.add_to(y.clone(), batch(delta, 2)), y)


def test_dropout_acts_on_the_input_of_the_branch_while_training() -> None:
    delta = build(LowRankDelta, dropout=0.5)
    x = batch(delta, 64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mask = torch.empty(64, 5).bernoulli_(0.5) * 2
        torch.manual_seed(0)
        y = delta(x)
    torch.testing.assert_close(y, (x * mask) @ dense(delta).T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(delta.eval()(x), x @ dense(delta).T, rtol=1e-12, atol=1e-12)


# ---- the theorem


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_factor_tells_the_same_sum(kind, shape) -> None:
    """⟨A, ∂A⟩ = ⟨B, ∂B⟩ = ⟨ΔW, G⟩, and per rank e · ∂e = ⟨a, ∂a⟩ = ⟨b, ∂b⟩."""
    delta = build(kind, [ACTIVE, ACTIVE, RESERVE], shape=shape)
    x, D = batch(delta, 6), batch(build(kind, shape=shape[::-1]), 6, seed=9)
    delta(x).backward(D)
    blocks = [delta.block(i) for i in delta.live]
    sums = {letter: sum((b[letter] * b[letter].grad).sum() for b in blocks) for letter in "AB"}
    expected = (delta.weight() * (D.T @ x)).sum()
    torch.testing.assert_close(sums["A"], expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(sums["B"], expected, rtol=1e-11, atol=1e-12)
    for b in blocks:
        per_rank = (b["A"] * b["A"].grad).sum(1)
        torch.testing.assert_close(per_rank, (b["B"] * b["B"].grad).sum(0), rtol=1e-11, atol=1e-12)
        if "E" in b and b["E"].grad is not None:
            torch.testing.assert_close(per_rank, (b["E"] * b["E"].grad)[:, 0], rtol=1e-11, atol=1e-12)
    if kind is TripletDelta:
        assert [b["E"].grad is None for b in blocks] == [False, False, True]


# ---- what growth moves


def increlora(**settings) -> BlockDelta:
    """The delta of IncreLoRA for one of six sites of 4 × 3, in float64, trained a little by hand."""
    delta = settings_of("increlora", **{"r": 3, "lora_alpha": 6, "grow_by": 1} | settings).method(6, 42)
    built = delta.make_delta(Site("m", 4, 3, 6, 42, torch.float64))
    assert isinstance(built, BlockDelta)
    with torch.no_grad():
        for p in built.block(0).values():
            p.add_(normal(tuple(p.shape), torch.Generator().manual_seed(1), 0))
    return built


@pytest.mark.parametrize(("epsilon", "ratio"), [(1e-5, 1.00001 / 2.00001), (0.0, 0.5)])
def test_t1_growing_by_one_rank_halves_what_was_learnt(epsilon: float, ratio: float) -> None:
    delta = increlora(scaling="active_rank", scale_epsilon=epsilon, reserve="frozen")
    before = delta.weight().detach()
    delta.become(1, ACTIVE)  # its e is 0
    torch.testing.assert_close(delta.weight().detach(), ratio * before, rtol=1e-14, atol=0)


def test_t1_in_the_paper_preset() -> None:
    delta = IncreLoraPaper.paper(2, lora_alpha=8).method(6, 42).make_delta(Site("m", 4, 3, 6, 42, torch.float64))
    assert delta.scale_of(2) / delta.scale_of(1) == pytest.approx(1.00001 / 2.00001, rel=1e-15)
    assert delta.scale_of(1) == pytest.approx(8 / 1.00001, rel=1e-15)
    zero = IncreLoraPaper.paper(2, lora_alpha=0).method(6, 42).make_delta(Site("m", 4, 3, 6, 42))
    assert zero.scale_of(1) == pytest.approx(1 / 1.00001, rel=1e-15)  # α ≤ 0 stands for init_r


@pytest.mark.parametrize(("newborn", "reserve"), [("published", "trained"), ("lora", "none")])
def test_growth_moves_the_update_by_the_newborns_own_start_and_no_more(newborn: str, reserve: str) -> None:
    """Constant scale. By default B of a newborn is 0, and growth moves nothing. A reserve in training enters with
    s · 1e-5 · B A (A, B ~ N(0, 0.02²): below 1e-7 of entries of order one); its birth then moves nothing at all."""
    delta = increlora(newborn=newborn, reserve=reserve)
    weights = []
    for status in (DORMANT, RESERVE, ACTIVE):
        delta.become(1, status)
        weights.append(delta.weight().detach())
    assert torch.equal(weights[1], weights[2])
    own = 2.0 * delta.block(1)["B"].detach() @ (delta.block(1)["E"].detach() * delta.block(1)["A"].detach())
    torch.testing.assert_close(weights[1] - weights[0], own, rtol=1e-6, atol=1e-16)
    assert (own.abs().max() < 1e-7) and (own.abs().max() > 0) == (newborn == "published")
    if newborn == "published":
        assert torch.equal(delta.block(1)["E"], torch.full((1, 1), 1e-5, dtype=torch.float64))


@pytest.mark.parametrize("reserve", ["frozen", "none"])
def test_without_a_trained_reserve_growth_moves_nothing(reserve: str) -> None:
    delta = increlora(reserve=reserve, newborn="published")
    before = delta.weight().detach()
    delta.become(1, ACTIVE)
    assert torch.equal(delta.weight().detach(), before)
    assert delta.block(1)["A"].abs().min() > 0


# ---- initial values

TRAINED = {"reserve": "trained", "newborn": "published"}


def test_initial_values_are_the_same_in_every_process() -> None:
    """Golden values: nothing about the process (hash seed, global generator, order) enters."""
    torch.manual_seed(3)
    delta = PlainLora(r=2, seed=7).method(1, 7).make_delta(Site("layer.q", 4, 3, 1, 7))
    golden = [[-0.43636637926101685, -0.3480977416038513, -0.21460628509521484, -0.29697495698928833],
              [0.2636486887931824, 0.4514603018760681, 0.1087079644203186, -0.3462013602256775]]  # fmt: skip
    assert delta.block(0)["A"].tolist() == golden
    assert torch.equal(delta.block(0)["B"], torch.zeros(3, 2))


def test_initial_values_do_not_depend_on_the_order_of_construction() -> None:
    def values(names: Sequence[str], **options) -> dict[str, Tensor]:
        built = {n: build(TripletDelta, [ACTIVE, DORMANT, DORMANT], name=n, **options) for n in names}
        return {f"{n}.{k}": p.detach() for n, d in built.items() for k, p in d.named_parameters()}

    one, other = values(["a", "b", "c"]), values(["c", "a", "b"])
    assert all(torch.equal(one[key], other[key]) for key in one)
    distinct = {tuple(v.flatten().tolist()) for v in one.values()}
    assert len(distinct) == len(one) == 27  # every module, block and letter draws its own
    seeded = values(["a", "b", "c"], seed=1)
    assert not any(torch.equal(one[key], seeded[key]) for key in one)


def test_the_distributions_of_initial_values() -> None:
    generator = torch.Generator().manual_seed(0)
    uniform = kaiming((200, 100), generator, 0)
    assert 0.099 < uniform.abs().max() <= 0.1 and abs(uniform.mean()) < 2e-3 and uniform.min() < -0.099
    normal_values = gaussian((200, 100), generator, 0)
    assert normal_values.std().item() == pytest.approx(0.02, rel=0.02) and abs(normal_values.mean()) < 1e-3
    assert torch.equal(zeros((2, 3), generator, 0), torch.zeros(2, 3))
    assert torch.equal(ones((2, 3), generator, 0), torch.ones(2, 3))


@pytest.mark.parametrize(("settings", "start", "later"), [
    ({}, ("kaiming", 1.0, "zeros"), ("kaiming", 1.0, "zeros")),
    (TRAINED, ("kaiming", 1.0, "zeros"), ("gaussian", 1e-5, "gaussian")),
    ({"reserve": "frozen", "newborn": "published"}, ("kaiming", 1.0, "zeros"), ("gaussian", 0.0, "gaussian")),
    (TRAINED | {"start": "published"}, ("gaussian", 0.0, "gaussian"), ("gaussian", 1e-5, "gaussian")),
    ({"init_lora_weights": False}, ("kaiming", 1.0, "gaussian"), ("kaiming", 1.0, "gaussian")),
])  # fmt: skip
def test_initial_values_of_increlora(settings, start, later) -> None:
    delta = (
        settings_of("increlora", r=3, **settings)
        .method(6, 2400)
        .make_delta(Site("m", 200, 200, 6, 2400, torch.float64))
    )
    for block, (a, e, b) in enumerate([start, later]):
        values = delta.block(block)
        assert torch.equal(values["E"], torch.full_like(values["E"], e))
        for letter, kind in (("A", a), ("B", b)):
            bounds = {"gaussian": (0.035, 0.12), "kaiming": (0.06, 200**-0.5), "zeros": (0.0, 0.0)}[kind]
            assert bounds[0] <= values[letter].abs().max() <= bounds[1], (letter, block)
            if kind == "kaiming":
                assert values[letter].std().item() == pytest.approx(200**-0.5 / 3**0.5, rel=0.15)
            if kind == "gaussian":
                assert values[letter].std().item() == pytest.approx(0.02, rel=0.2)
