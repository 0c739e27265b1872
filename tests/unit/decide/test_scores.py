"""Importance scores against their slow twins, and the hand-computed cases T2, T3, T4, T11."""

import math

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from increlora import IncreLoraConfig, attach
from increlora.decide.scores import delta_sensitivity, normaliser, signed_sensitivity, smooth
from increlora.deltas import Status, TripletDelta
from tests.reference import naive
from tests.switches import departing

SHAPES = [(1, 1, 1, 1), (1, 7, 3, 2), (3, 5, 8, 4), (2, 1, 9, 5), (4, 6, 6, 1)]  # R, in, out, N


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def operands(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    R, n, m, N = shape
    return tuple(draw(*s, seed=i, dtype=dtype) for i, s in enumerate([(R, n), (m, R), (N, n), (N, m)]))


@pytest.fixture
def t2() -> tuple[TripletDelta, Tensor, Tensor]:
    """The delta, input and output gradient of case T2."""
    values = {"A": [[1.0, 2, -1]], "E": [[0.5]], "B": [[1.0], [-2]]}
    delta = TripletDelta(
        3, 2, [1], dtype=torch.float64, scale=lambda rank: 2 / (rank + 1e-5),
        init={letter: lambda *_, v=v: torch.tensor(v, dtype=torch.float64) for letter, v in values.items()},
    )  # fmt: skip
    delta.become(0, Status.ACTIVE)
    X = torch.tensor([[1.0, 0, 2], [0, 1, -1]], dtype=torch.float64)
    D = torch.tensor([[1.0, -1], [2, 0.5]], dtype=torch.float64)
    return delta, X, D


# ---- the hand-computed cases


@pytest.mark.parametrize(("norm", "expected"), [
    ("sqrt_numel", 5.715418912304959), ("mean", 13.99986000139998600 / 6), ("sum", 13.99986000139998600),
])  # fmt: skip
def test_t2_score(t2, norm: str, expected: float) -> None:
    delta, X, D = t2
    assert delta_sensitivity(*delta.factors(), X, D, norm=norm).item() == pytest.approx(expected, rel=1e-14)


def test_t2_output_gradients_and_sums(t2) -> None:
    delta, X, D = t2
    half = 1 / 1.00001
    delta(X).backward(D)
    block = delta.block(0)
    assert delta.scale == pytest.approx(1.99998000020, rel=1e-11)
    torch.testing.assert_close(delta(X).detach(), half * torch.tensor([[-1, 2], [3, -6]]).double())
    torch.testing.assert_close(delta.weight().detach(), half * torch.tensor([[1, 2, -1], [-2, -4, 2]]).double())
    torch.testing.assert_close(block["A"].grad, half * torch.tensor([[3, 1, 5]]).double())
    torch.testing.assert_close(block["B"].grad, half * torch.tensor([[5], [2.5]]).double())
    torch.testing.assert_close(block["E"].grad, torch.zeros(1, 1).double(), atol=1e-15, rtol=0)
    products = delta.weight().detach() * (D.T @ X)
    assert products.sum(0).abs().sum().item() == pytest.approx(10 * half, rel=1e-5)
    assert products.sum(1).abs().sum().item() == pytest.approx(10 * half, rel=1e-5)
    assert signed_sensitivity(block["B"], block["B"].grad).item() == pytest.approx(0, abs=1e-14)  # entry-wise: 14


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tile_numel", [1, 2, 3, 5, 6, 7, 8, 12, 13, 1 << 20])
def test_t3_every_tiling_gives_the_same_score(t2, tile_numel: int, dtype: torch.dtype) -> None:
    delta, X, D = t2
    factors = [t.to(dtype) for t in (*delta.factors(), X, D)]
    score = delta_sensitivity(*factors, tile_numel=tile_numel)
    assert score.item() == pytest.approx(5.715418912304959, rel=1e-14 if dtype == torch.float64 else 1e-6)


def test_t4_moving_averages() -> None:
    sensitivity = uncertainty = torch.zeros(1, dtype=torch.float64)
    seen = []
    for score in (1.0, 2.0, 4.0):
        S = torch.tensor([score], dtype=torch.float64)
        sensitivity, uncertainty = smooth(sensitivity, uncertainty, S, beta=0.85, beta_uncertainty=0.85)
        seen += [sensitivity.item(), uncertainty.item(), (sensitivity * uncertainty).item()]
    assert seen == pytest.approx(
        [0.15, 0.1275, 0.019125, 0.4275, 0.34425, 0.147166875, 0.963375, 0.74810625, 0.72070685859375], rel=1e-14
    )


# ---- parity with the slow twins


@pytest.mark.parametrize("norm", ["sqrt_numel", "mean", "sum"])
@pytest.mark.parametrize("shape", SHAPES)
def test_delta_sensitivity_equals_its_twin(shape, norm: str) -> None:
    args = operands(shape)
    expected = naive.delta_sensitivity(*args, norm=norm)
    for tile_numel in (1, shape[1], 2 * shape[1], 2 * shape[1] + 1, 1 << 20):  # panels of 1, 1, 2, 2, all rows
        score = delta_sensitivity(*args, norm=norm, tile_numel=tile_numel)
        assert score.item() == pytest.approx(expected, rel=1e-13)
        assert score.shape == () and score.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (4, 33, 17, 40)])
def test_delta_sensitivity_accumulates_in_float32(shape, dtype: torch.dtype) -> None:
    args = operands(shape, dtype)
    expected = naive.delta_sensitivity(*args, norm="sqrt_numel")
    for tile_numel in (1, 3 * shape[1] + 1, 1 << 20):
        score = delta_sensitivity(*args, tile_numel=tile_numel)
        assert score.dtype == torch.float32
        assert score.item() == pytest.approx(expected, rel=1e-6)


def test_float32_accumulation_over_many_tiles() -> None:
    args = operands((3, 64, 96, 50), torch.float32)
    exact = delta_sensitivity(*(t.double() for t in args)).item()
    for tile_numel in (1, 1000, 1 << 20):
        assert delta_sensitivity(*args, tile_numel=tile_numel).item() == pytest.approx(exact, rel=1e-6)


def test_delta_sensitivity_leaves_its_operands_alone() -> None:
    args = tuple(t.requires_grad_() for t in operands((2, 5, 4, 3)))
    before = [t.detach().clone() for t in args]
    assert not delta_sensitivity(*args).requires_grad
    assert all(torch.equal(t, b) for t, b in zip(args, before))


def test_normalisers_differ_by_the_root_of_the_size() -> None:
    assert [normaliser(norm, 12) for norm in ("sqrt_numel", "mean", "sum")] == [math.sqrt(12), 12.0, 1.0]


@pytest.mark.parametrize("shape", SHAPES)
def test_signed_sensitivity_is_the_sum_over_the_dense_product(shape) -> None:
    A, B, X, D = operands(shape)
    B_grad = D.T @ X @ A.T
    expected = naive.signed_sensitivity(B @ A, D.T @ X)
    assert signed_sensitivity(B, B_grad).item() == pytest.approx(expected, rel=1e-12)
    half = signed_sensitivity(B.bfloat16(), B_grad.bfloat16())
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(naive.signed_sensitivity(B.bfloat16(), B_grad.bfloat16()), rel=1e-5)


def test_signed_sensitivity_never_exceeds_the_entry_wise_one() -> None:
    A, B, X, D = operands((3, 5, 8, 4))
    signed, entrywise = signed_sensitivity(B, D.T @ X @ A.T), delta_sensitivity(A, B, X, D, norm="sum")
    assert 0 < signed < entrywise


@pytest.mark.parametrize("betas", [(0.85, 0.85), (0.0, 0.0), (0.5, 0.9), (0.99, 0.1)])
def test_smooth_equals_its_twin_over_many_steps(betas: tuple[float, float]) -> None:
    scores = draw(40, 5, seed=3).abs().exp()
    scores[3, 1], scores[4, 2], scores[5, 0], scores[39, 4] = math.nan, math.inf, -math.inf, math.nan
    fast = (torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64))
    slow = ([0.0] * 5, [0.0] * 5)
    for score in scores:
        fast = smooth(*fast, score, beta=betas[0], beta_uncertainty=betas[1])
        slow = naive.smooth(*slow, score.tolist(), *betas)
        assert fast[0].tolist() == pytest.approx(slow[0], rel=1e-13)
        assert fast[1].tolist() == pytest.approx(slow[1], rel=1e-13, abs=1e-15)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_smooth_leaves_out_a_non_finite_score_of_that_module_only(bad: float) -> None:
    sensitivity, uncertainty = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.25])
    score = torch.tensor([bad, 4.0])
    after = smooth(sensitivity, uncertainty, score, beta=0.5, beta_uncertainty=0.5)
    assert [t.tolist() for t in after] == [[1.0, 3.0], [0.5, 0.625]]
    assert sensitivity.tolist() == [1.0, 2.0] and uncertainty.tolist() == [0.5, 0.25]


def test_the_last_128_scores_decide_the_averages() -> None:
    """Starting from zero 128 steps before an event changes (I, U) by less than 1e-7: what `score_window` relies on."""
    scores = (0.7 * draw(600, 4, seed=8)).exp()
    zero = torch.zeros(4, dtype=torch.float64)
    whole, windowed = (zero, zero), (zero, zero)
    for i, score in enumerate(scores):
        whole = smooth(*whole, score, beta=0.85, beta_uncertainty=0.85)
        if i >= len(scores) - 128:
            windowed = smooth(*windowed, score, beta=0.85, beta_uncertainty=0.85)
    torch.testing.assert_close(windowed, whole, rtol=1e-7, atol=0)


# ---- T11: one weight used twice in a forward pass


class Shared(nn.Module):
    """One linear map applied to two inputs, the uses weighted differently."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3, bias=False, dtype=torch.float64)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return 0.3 * self.linear(first).square().sum() + 2.0 * self.linear(second).pow(3).sum()


@pytest.mark.parametrize("accumulate", ["last", "mean", "exact", "signed"])
def test_t11_shared_weight(accumulate: str) -> None:
    """Published: the first use alone, which autograd reaches last.   exact: Σ|ΔW ∘ (G1 + G2)| / √(mn).
    The signed score sees both uses by itself: |Σ ΔW ∘ (G1 + G2)|."""
    how = {"score": "signed"} if accumulate == "signed" else {"score_accumulation": accumulate}
    config = departing(
        IncreLoraConfig, r=2, init_lora_weights=False, score_window=None, target_modules=["linear"], **how
    )
    model = get_peft_model(Shared(), config)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    controller = attach(model, optimizer, total_steps=100, record=True)
    X = [draw(4, 5, seed=1), draw(6, 5, seed=2)]
    weight = model.base_model.model.linear.base_layer.weight.detach() + controller.deltas[0].weight().detach()
    D = [0.6 * X[0] @ weight.T, 6.0 * (X[1] @ weight.T).square()]
    A, B = (t.detach() for t in controller.deltas[0].factors())
    parts = [naive.delta_sensitivity(A, B, x, d, norm="sqrt_numel") for x, d in zip(X, D, strict=True)]
    whole = naive.delta_sensitivity(A, B, torch.cat(X), torch.cat(D), norm="sqrt_numel")
    signed = naive.signed_sensitivity(B @ A, torch.cat(D).T @ torch.cat(X))
    expected = {"last": parts[0], "mean": sum(parts) / 2, "exact": whole, "signed": signed}
    assert len({round(v / whole, 3) for v in expected.values()}) == 4
    model(*X).backward()
    optimizer.step()
    assert controller.records[0]["modules"]["linear"]["score"] == pytest.approx(expected[accumulate], rel=1e-12)


# ---- what a run takes its scores from


def run(steps: int, *, scaler: torch.amp.GradScaler | None = None, **settings) -> list[dict]:
    """Records of a small driven run in float64, loss scaled where a scaler is given."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    options = {"r": 2, "init_lora_weights": False, "warmup_steps": 10, "interval_steps": 10, "top_h": 2, "grow_by": 1}
    model = get_peft_model(plain, IncreLoraConfig(**options | settings, target_modules=["0", "2"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    controller = attach(model, optimizer, total_steps=steps, record=True)
    x = draw(7, 5, seed=4)
    for _ in range(steps):
        loss = model(x).square().mean()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    return [record["modules"] for record in controller.records]


@pytest.mark.parametrize("window", [1, 4, None])
def test_only_the_last_steps_before_an_event_are_scored(window: int | None) -> None:
    """Events at 20; the budget is met there, and nothing is scored afterwards."""
    scored = [g for g, modules in enumerate(run(23, score_window=window)) if modules["0"]["score"] is not None]
    assert scored == list(range(0 if window is None else 21 - window, 21))


@pytest.mark.parametrize("kind", ["delta", "signed"])
def test_scores_do_not_see_the_loss_scale(kind: str) -> None:
    """The scale changes after every second step; scores and ranks do not."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    plain, scaled = (run(21, score=kind, score_window=None, scaler=s) for s in (None, scaler))
    for one, other in zip(plain, scaled, strict=True):
        for name in one:
            assert one[name]["score"] == pytest.approx(other[name]["score"], rel=1e-9)
    assert plain[-1]["0"]["rank"] == scaled[-1]["0"]["rank"] == 2
    assert scaler.get_scale() > 1024
