"""MELoRA's formulas and options: the hand-computed cases of the specification (T1 to T13), and every refusal."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from increlora import MeLoraConfig
from increlora.deltas import BlockDelta, LowRankDelta, Status
from increlora.errors import ConfigError
from increlora.methods import PlainLora, Site
from increlora.structural.melora import BlockDiagonalDelta, MeLora
from tests.reference.official_melora import OfficialMeLora, standard_deviation

SHAPES = [(4, 6), (6, 4), (8, 8), (2, 10)]  # in, out: the scale is folded into the smaller factor


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def delta_of(config: MeLora | PlainLora, in_features: int, out_features: int, **site) -> BlockDelta:
    options = {"dtype": torch.float64} | site
    place = Site("layer.3.value", in_features, out_features, 1, in_features + out_features, **options)
    return config.method(1, in_features + out_features).make_delta(place)


def random(minis: int = 2, shape: tuple[int, int] = (4, 6), r: int = 3, **site) -> BlockDelta:
    return delta_of(MeLora(r=r, minis=minis, lora_alpha=5, init_lora_weights=False, seed=1), *shape, **site)


def filled(minis: int, scale: float, A: list, B: list) -> BlockDelta:
    """A delta with the given mini adapters, all of one rank."""
    r, k, d = len(A[0]), len(A[0][0]) * minis, len(B[0]) * minis
    delta = delta_of(MeLora(r=r, minis=minis, lora_alpha=scale * r), k, d)
    with torch.no_grad():
        delta.lora_A0.copy_(torch.cat([tensor(a) for a in A]))
        delta.lora_B0.copy_(torch.cat([tensor(b) for b in B]))
    return delta


def worked_example() -> BlockDelta:
    return filled(2, 2, [[[1, 2]], [[3, -1]]], [[[1], [0], [2]], [[-1], [1], [0.5]]])


def batch(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def dense(delta: BlockDelta) -> Tensor:
    """ΔW by a loop over minis, without a scale folded anywhere."""
    n = delta.minis
    A, B = delta.lora_A0.detach().chunk(n), delta.lora_B0.detach().chunk(n)
    return torch.block_diag(*(delta.scale * b @ a for a, b in zip(A, B, strict=True)))


# ---- the hand cases


def test_t1_forward() -> None:
    assert worked_example()(tensor([[1, 2, 3, 4]])).tolist() == [[10, 0, 20, -10, 10, 5]]


def test_t2_merge() -> None:
    delta = worked_example()
    rows = [[2, 4, 0, 0], [0, 0, 0, 0], [4, 8, 0, 0], [0, 0, -6, 2], [0, 0, 6, -2], [0, 0, 3, -1]]
    assert delta.weight().tolist() == rows
    A, B = delta.factors()
    assert A.shape == (2, 4) and B.shape == (6, 2) and (B @ A).tolist() == rows
    assert int(torch.linalg.matrix_rank(delta.weight())) == 2
    assert (delta.weight() @ tensor([1, 2, 3, 4])).tolist() == [10, 0, 20, -10, 10, 5]


def test_t3_gradients_of_the_sum_of_outputs() -> None:
    delta, x = worked_example(), tensor([[1, 2, 3, 4]]).requires_grad_()
    delta(x).sum().backward()
    assert delta.lora_A0.grad.tolist() == [[6, 12], [3, 4]]
    assert delta.lora_B0.grad.flatten().tolist() == [10] * 6
    assert x.grad.tolist() == [[6, 12, 3, -1]]


def test_t4_unequal_ranks_are_equal_ones_with_zeros() -> None:
    """Ranks (2, 1) with α 16 each, so s = (8, 16): what the published code can, and this library has no option for."""
    delta = filled(2, 8, [[[1, 0], [0, 1]], [[1, 1], [0, 0]]], [[[1, 2], [3, 4]], [[10, 0], [12, 0]]])
    assert delta(tensor([[1, 2, 3, 4]])).tolist() == [[40, 88, 560, 672]]
    assert int(torch.linalg.matrix_rank(delta.weight())) == 3


@pytest.mark.parametrize(("minis", "r", "k", "d"), [(2, 8, 384, 384), (8, 1, 96, 96), (4, 2, 96, 48)])
def test_t5_the_rank_is_the_sum_over_the_mini_adapters(minis: int, r: int, k: int, d: int) -> None:
    delta = random(minis, (minis * k, minis * d), r)
    assert int(torch.linalg.matrix_rank(delta.weight())) == minis * r
    assert delta.rank == r and delta.factors()[0].shape[0] == minis * r


def test_t6_a_slice_of_the_input_reaches_its_slice_of_the_output_alone() -> None:
    delta, x = random(4, (8, 12)), batch(3, 8)
    for j in range(4):
        moved = x.clone()
        moved[:, 2 * j : 2 * j + 2] += 1
        outside = [i for i in range(12) if i // 3 != j]
        before, after = delta(x), delta(moved)
        assert torch.equal(before[:, outside], after[:, outside])
        assert (before != after)[:, 3 * j : 3 * j + 3].all()


@pytest.mark.parametrize(("minis", "published"), [(1, 0.02083), (2, 0.02946), (8, 0.05893)])
def test_t7_the_start_is_that_of_narrow_modules(minis: int, published: float) -> None:
    delta = delta_of(MeLora(r=32, minis=minis), 768, 768)
    assert torch.equal(delta.weight(), torch.zeros(768, 768, dtype=torch.float64)) and not delta.lora_B0.any()
    assert delta.lora_A0.abs().max() < math.sqrt(minis / 768)
    assert standard_deviation(minis, 768) == pytest.approx(published, abs=5e-6)
    assert float(delta.lora_A0.detach().std()) == pytest.approx(published, rel=0.02)


def test_t7_the_flag_for_other_initial_values_is_honoured() -> None:
    """Trap 10: the published code ignores it."""
    assert random().lora_B0.detach().abs().min() > 0


def test_t8_one_mini_adapter_is_lora() -> None:
    for shape in SHAPES:
        one, plain = (delta_of(m(r=2, init_lora_weights=False, **o), *shape)
                      for m, o in ((MeLora, {"minis": 1}), (PlainLora, {})))  # fmt: skip
        assert type(one) is LowRankDelta
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), plain.parameters(), strict=True))
        assert torch.equal(one(batch(3, shape[0])), plain(batch(3, shape[0])))


@pytest.mark.parametrize("minis", [1, 2, 4, 8])
def test_t9_parameters_are_those_of_lora_whatever_n_is(minis: int) -> None:
    delta = delta_of(MeLora(r=3, minis=minis), 16, 24)
    assert sum(p.numel() for p in delta.parameters()) == 3 * (16 + 24)
    assert MeLora(r=3, minis=minis).method(1, 40).budget == PlainLora(r=3).method(1, 40).budget


def test_trap_1_the_saving_of_the_instruction_runs_is_64_not_36() -> None:
    sites = 64, 64 * (4096 + 4096)  # query and value of Llama-2-7B
    mini, full = MeLora(r=1, minis=8).method(*sites).budget, PlainLora(r=64).method(*sites).budget
    assert (mini.parameters, full.parameters) == (524_288, 33_554_432)


@pytest.mark.parametrize(("config", "scale"), [
    (MeLora(), 1.0), (MeLora(minis=8), 1.0), (MeLora.paper(8), 2.0), (MeLora.paper(1, minis=8), 16.0),
    (PlainLora(r=64, lora_alpha=16), 0.25), (MeLora(alpha_pattern={"value": 4}, rank_pattern={"value": 2}), 2.0),
])  # fmt: skip
def test_trap_2_the_scale_is_that_of_the_mini_rank(config: MeLora | PlainLora, scale: float) -> None:
    """The published runs with Llama compare 16 with 0.25 at one learning rate."""
    assert delta_of(config, 64, 64).scale == scale


# ---- shapes


@pytest.mark.parametrize(("minis", "k", "d", "nearest"), [
    (2, 7, 4, 1), (4, 6, 8, 2), (4, 8, 6, 2), (3, 8, 8, 2), (5, 768, 2, 2), (16, 24, 36, 12), (5, 768, 768, 4),
    (1000, 64, 96, 32),
])  # fmt: skip
def test_t10_what_does_not_divide_is_refused_with_the_nearest_that_does(minis, k, d, nearest) -> None:
    """The published code drops the last inputs without a word, or fails in the forward pass."""
    with pytest.raises(ConfigError) as caught:
        delta_of(MeLora(minis=minis), k, d)
    message = str(caught.value)
    assert f"layer.3.value: minis={minis} does not divide both in={k} and out={d}" in message
    assert f"the nearest that does is {nearest}" in message and f"{{'layer.3.value': {nearest}}}" in message
    mended = delta_of(MeLora(minis=minis, minis_pattern={"layer.3.value": nearest}), k, d)
    assert getattr(mended, "minis", 1) == nearest


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 3, 4), (0,)])
@pytest.mark.parametrize("shape", SHAPES)
def test_t11_inputs_of_any_number_of_dimensions(lead: tuple[int, ...], shape: tuple[int, int]) -> None:
    """Trap 7: the published code takes three."""
    delta, x, y = random(2, shape), batch(*lead, shape[0]), batch(*lead, shape[1])
    torch.testing.assert_close(delta.add_to(y, x), y + x @ dense(delta).T, rtol=1e-13, atol=1e-13)
    strided = batch(shape[0], *lead).movedim(0, -1)
    torch.testing.assert_close(delta(strided), strided @ dense(delta).T, rtol=1e-13, atol=1e-13)


def test_t11_a_half_precision_base_keeps_its_dtype() -> None:
    delta, x, y = random(dtype=torch.float32), batch(3, 2, 4).bfloat16(), torch.ones(3, 2, 6).bfloat16()
    expected = 1 + x.float() @ dense(delta).T
    half = delta.add_to(y, x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.02, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert delta.add_to(y, x.float()).dtype == torch.bfloat16
        torch.testing.assert_close(delta.add_to(y.float(), x.float()), expected, rtol=0.02, atol=0.02)
    delta.bfloat16()
    assert delta.add_to(y, x).dtype == torch.bfloat16


# ---- one formula, three ways to it


@pytest.mark.parametrize("minis", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_t13_blocked_packed_and_loop_agree_in_outputs_and_gradients(minis: int, shape: tuple[int, int]) -> None:
    delta = random(minis, shape)
    x, g = batch(2, 7, shape[0]).requires_grad_(), batch(2, 7, shape[1])
    parts = dict(zip("AB", delta.parameters(), strict=True))
    linear = nn.Linear(*shape, dtype=torch.float64)
    loop = OfficialMeLora(linear, minis, 3, 5, lambda name, i, letter, size: parts[letter].detach().chunk(minis)[i])
    A, B = delta.factors()
    ways = {
        "blocked": (delta.add_to(linear(x), x), [x, *parts.values()]),
        "packed": (linear(x) + x @ A.T @ B.T, [x, *parts.values()]),
        "loop": (loop(x), [x, *loop.lora_A, *loop.lora_B]),
    }
    found = {}
    for name, (y, inputs) in ways.items():
        grads = list(torch.autograd.grad((y * g).sum(), inputs))
        if name == "loop":
            grads = [grads[0], torch.cat(grads[1 : 1 + minis]), torch.cat(grads[1 + minis :])]
        found[name] = y, *grads
    for name in ("packed", "loop"):
        torch.testing.assert_close(found["blocked"], found[name], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(delta.weight(), loop.delta_weight(), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(delta(torch.eye(shape[0]).double()), delta.weight().T, rtol=1e-13, atol=1e-14)


class Calls(TorchDispatchMode):
    """Counts torch operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_many_mini_adapters_take_no_more_calls_than_two() -> None:
    calls = {}
    for minis in (2, 4, 16):
        delta, x = random(minis, (32, 64)), batch(2, 5, 32).requires_grad_()
        with Calls() as seen:
            delta(x).sum().backward()
        calls[minis] = sorted(seen.names)
    assert calls[2] == calls[4] == calls[16]
    assert calls[2].count("aten.bmm.default") == 6 and not any("block_diag" in name for name in calls[2])


@pytest.mark.parametrize("shape", SHAPES)
def test_gradcheck(shape: tuple[int, int]) -> None:
    delta = random(2, shape, 2)
    names, values = zip(*((n, p.detach().clone().requires_grad_()) for n, p in delta.named_parameters()), strict=True)

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(delta, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (batch(3, shape[0]).requires_grad_(), *values))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_factor_tells_the_same_sum(shape: tuple[int, int]) -> None:
    """⟨A, ∂A⟩ = ⟨B, ∂B⟩ = ⟨ΔW, G⟩."""
    delta, x, D = random(2, shape), batch(6, shape[0]), batch(6, shape[1])
    delta(x).backward(D)
    expected = (delta.weight() * (D.T @ x)).sum()
    for p in delta.parameters():
        torch.testing.assert_close((p * p.grad).sum(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_in_several_blocks_are_the_same_ranks_in_one(shape: tuple[int, int]) -> None:
    options = {"init": {"A": lambda s, g, i: torch.randn(s, generator=g), "B": lambda s, g, i: torch.ones(s)}}
    many = BlockDiagonalDelta(*shape, [2, 1, 3], minis=2, scale=lambda rank: 3 / rank, dtype=torch.float64, **options)
    many.become(0, Status.ACTIVE)
    many.become(1, Status.ACTIVE)
    one = BlockDiagonalDelta(*shape, [3], minis=2, scale=lambda rank: 3 / rank, dtype=torch.float64, **options)
    one.become(0, Status.ACTIVE)
    with torch.no_grad():
        for letter, dim in (("A", 1), ("B", 2)):
            parts = [many.block(i)[letter].unflatten(0, (2, -1)) for i in (0, 1)]
            one.block(0)[letter].copy_(torch.cat(parts, dim=dim).flatten(0, 1))
    assert [many.size_of(many.block(i)["A"]) for i in range(3)] == [2, 1, 3]
    assert torch.equal(many(batch(4, shape[0])), one(batch(4, shape[0])))
    assert torch.equal(many.weight(), one.weight())


def test_dropout_acts_on_the_whole_input_while_training() -> None:
    config = MeLora(r=3, minis=2, lora_dropout=0.5, init_lora_weights=False)
    delta, x = delta_of(config, 4, 6), batch(64, 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mask = torch.empty(64, 4).bernoulli_(0.5) * 2
        torch.manual_seed(0)
        y = delta(x)
    torch.testing.assert_close(y, (x * mask) @ dense(delta).T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(delta.eval()(x), x @ dense(delta).T, rtol=1e-12, atol=1e-12)


# ---- settings


@pytest.mark.parametrize(("options", "message"), [
    ({"minis": 0}, "minis=0: give an int of at least 1"),
    ({"minis": 2.0}, "minis=2.0: give an int"),
    ({"minis": True}, "minis=True"),
    ({"r": 0}, "r=0"),
    ({"rank_pattern": {"query": 0}}, "rank_pattern: query=0"),  # trap 11
    ({"minis_pattern": {"query": 0}}, "minis_pattern: query=0"),
    ({"minis_pattern": {"query": "all"}}, "minis_pattern: query='all'"),
    ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
    ({"mode": "sum"}, "unexpected keyword argument 'mode'"),  # trap 15: left over in the published config
])  # fmt: skip
def test_bad_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MeLoraConfig(**options)


def test_ranks_by_name_leave_no_budget() -> None:
    config = MeLora(r=4, rank_pattern={"value": 2})
    assert config.method(1, 10).budget.ranks is None and delta_of(config, 4, 6).rank == 2


def test_the_preset_is_the_published_script() -> None:
    paper = MeLoraConfig.paper(8)
    assert (paper.r, paper.minis, paper.lora_alpha, paper.lora_dropout) == (8, 2, 16, 0.05)
    assert MeLoraConfig.paper(1, minis=8).settings() == MeLora.paper(1, minis=8)
