"""Plain loops on a toy network: what counts as a step, what is left out of it, and every refusal."""

from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from increlora import IncreLoraConfig, attach
from increlora.decide.scores import delta_sensitivity
from increlora.deltas import Status
from increlora.errors import DriveError, ScheduleError
from increlora.runtime import Controller
from increlora.runtime.taps import PATIENCE
from tests.reference.loop import adamw, controller_of, fused, trainable
from tests.reference.toy import toy_batches, toy_loss, toy_network
from tests.switches import departing

torch.set_num_threads(1)  # these networks are too small to share between threads

STEPS = 16
SCHEDULE = {"r": 2, "warmup_steps": 3, "interval_steps": 2, "top_h": 2, "birth_warmup": 2,
            "target_modules": ["up", "down"]}  # events at 4, 6 and 8  # fmt: skip
Make = Callable[[list[nn.Parameter]], Optimizer]


def adapted(**options) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return get_peft_model(toy_network(), departing(IncreLoraConfig, **SCHEDULE | options))


def live(model: nn.Module) -> dict[str, Tensor]:
    controller = controller_of(model)
    return {
        f"{delta.name}.{letter}{i}": p.detach().clone()
        for delta in controller.deltas
        for i in delta.indices(Status.ACTIVE, Status.RESERVE)
        for letter, p in delta.block(i).items()
    }


def scores(controller: Controller) -> Tensor:
    taken = [[m["score"] for m in r["modules"].values()] for r in controller.records]
    return torch.tensor([[torch.nan if s is None else s for s in row] for row in taken], dtype=torch.float64)


def train(
    model: nn.Module, *, make: Make = adamw, accumulation: int = 1, scaler: torch.amp.GradScaler | None = None,
    steps: int = STEPS, size: int = 8, before: Callable[[int, nn.Module], None] | None = None,
) -> tuple[Controller, Optimizer]:  # fmt: skip
    """A plain loop, recorded; `before(step, model)` runs after the backward passes of each step."""
    optimizer = make(trainable(model))
    controller = attach(model, optimizer, record=True)
    whole = [step[0] for step in toy_batches(1, steps, size=size)]
    for step, (x, y) in enumerate(whole):
        optimizer.zero_grad()
        for part_x, part_y in zip(x.chunk(accumulation), y.chunk(accumulation), strict=True):
            loss = toy_loss(model(part_x), part_y) / accumulation
            (scaler.scale(loss) if scaler else loss).backward()
        if before:
            before(step, model)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
    return controller, optimizer


def assert_equal_runs(model: nn.Module, other: nn.Module, *, rtol: float = 0, steps: slice = slice(None)) -> None:
    """Same decisions, scores and parameters."""
    a, b = controller_of(model), controller_of(other)
    assert [asdict(e) | {"importance": 0} for e in a.events] == [asdict(e) | {"importance": 0} for e in b.events]
    torch.testing.assert_close(scores(a)[steps], scores(b)[steps], rtol=rtol, atol=0, equal_nan=True)
    torch.testing.assert_close(live(model), live(other), rtol=rtol, atol=rtol)


@pytest.fixture(scope="module")
def straight() -> nn.Module:
    model = adapted()
    controller, _ = train(model)
    assert controller.finished and len(set(controller.ranks.values())) > 1
    return model


# -- accumulation ------------------------------------------------------------------------------------------------------


def one_step(how: str, *, accumulation: int) -> tuple[Controller, list[tuple[Tensor, Tensor]], nn.Module]:
    """Scores of the second step (B no longer zero), and what each module saw in it."""
    model = adapted(score_accumulation=how, orthogonality=0.0)
    controller, _ = train(model, accumulation=accumulation, steps=2)
    return controller, [], model


def watched(model: nn.Module, x: Tensor, y: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Input and output of every adapted module in model order, and the loss."""
    calls: list[tuple[Tensor, Tensor]] = []
    layers = [m for m in model.modules() if hasattr(m, "lora_delta")]
    hooks = [m.register_forward_hook(lambda m, args, out: calls.append((args[0].detach(), out))) for m in layers]
    loss = toy_loss(model(x), y)
    for hook in hooks:
        hook.remove()
    return calls, loss


def by_hand(how: str, accumulation: int) -> Tensor:
    """The scores of the second step out of full gradients of ΔW: a naive twin without tap or watcher."""
    model = adapted(orthogonality=0.0)
    train(model, accumulation=accumulation, steps=1)
    deltas = controller_of(model).deltas
    (x, y), seen = [step[0] for step in toy_batches(1, 2)][1], []
    for part_x, part_y in zip(x.chunk(accumulation), y.chunk(accumulation), strict=True):
        calls, loss = watched(model, part_x, part_y)
        grads = torch.autograd.grad(loss / accumulation, [out for _, out in calls])
        seen.append([(a, g) for (a, _), g in zip(calls, grads)])
    weights = [d.weight() for d in deltas]
    per_part = [
        torch.stack([(w * (g.T @ a)).abs().sum() / w.numel() ** 0.5 for w, (a, g) in zip(weights, part)])
        for part in seen
    ]
    if how == "exact":
        G = [sum(part[i][1].T @ part[i][0] for part in seen) for i in range(len(deltas))]
        return torch.stack([(d.weight() * g).abs().sum() / g.numel() ** 0.5 for d, g in zip(deltas, G)]).detach()
    return (torch.stack(per_part).mean(0) if how == "mean" else per_part[-1]).detach()


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("how", ["mean", "last", "exact"])
def test_scores_under_accumulation(how, accumulation):
    controller, _, _ = one_step(how, accumulation=accumulation)
    torch.testing.assert_close(scores(controller)[1], by_hand(how, accumulation), rtol=1e-10, atol=0)


def test_the_three_kinds_of_accumulation_differ():
    """|ΣG| ≠ Σ|G|: none stands for another."""
    mean, last, exact = (scores(one_step(how, accumulation=4)[0])[1] for how in ("mean", "last", "exact"))
    assert not torch.isclose(mean, last).any() and (mean * 4 > exact * 1.0001).all()


def test_exact_scores_do_not_depend_on_how_the_batch_is_cut():
    whole, cut = adapted(score_accumulation="exact"), adapted(score_accumulation="exact")
    train(whole)
    train(cut, accumulation=4)
    assert_equal_runs(cut, whole, rtol=1e-9)


class Twice(nn.Module):
    """One linear map, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.tanh(self.up(x)))


@pytest.mark.parametrize("how", ["mean", "last", "exact"])
def test_a_module_used_twice(how):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = Twice().double()
    model = get_peft_model(base, departing(
        IncreLoraConfig, r=2, init_lora_weights=False, target_modules=["up"], warmup_steps=3, interval_steps=1,
        top_h=1, birth_warmup=0, score_accumulation=how, orthogonality=0.0,
    ))  # fmt: skip
    optimizer = SGD(trainable(model), lr=0.1)
    controller = attach(model, optimizer, record=True)
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer, delta = model.base_model.model.up, controller.deltas[0]
    seen: list[tuple[Tensor, Tensor]] = []
    hook = layer.register_forward_hook(lambda m, args, out: (seen.append((args[0], out)), None)[1])
    loss = model(x).square().mean()
    hook.remove()
    grads = torch.autograd.grad(loss, [out for _, out in seen], retain_graph=True)
    controller.rules[0].forget()
    weight = delta.weight().detach()
    pairs = [(weight * (g.T @ a)).abs().sum() / 5 for (a, _), g in zip(seen, grads)]
    together = (weight * sum(g.T @ a for (a, _), g in zip(seen, grads))).abs().sum() / 5
    loss.backward()
    optimizer.step()
    expected = {"mean": (pairs[0] + pairs[1]) / 2, "last": pairs[0], "exact": together}[how]  # backward runs backwards
    torch.testing.assert_close(scores(controller)[0, 0], expected.detach(), rtol=1e-10, atol=0)


# -- steps of other shapes ---------------------------------------------------------------------------------------------


def sgd(params) -> SGD:
    return SGD(params, lr=0.05, momentum=0.9)


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("make", [adamw, sgd, fused])
def test_closures(make, keyword):
    """Gradients exist only once the closure has run; the first step counts like every other."""
    expected, model = adapted(), adapted()
    train(expected, make=make)
    optimizer = make(trainable(model))
    controller_of(model).recording = True
    for [(x, y)] in toy_batches(1, STEPS):

        def closure(x=x, y=y) -> Tensor:
            optimizer.zero_grad()
            loss = toy_loss(model(x), y)
            loss.backward()
            return loss

        loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert loss.isfinite()
    assert controller_of(model).step == STEPS
    assert_equal_runs(model, expected)


@pytest.mark.parametrize("how", ["attach", "closure"])
def test_lbfgs_is_refused_before_anything_moves(how):
    model = adapted()
    optimizer = torch.optim.LBFGS(trainable(model))
    before = live(model)
    x, y = toy_batches(1, 1)[0][0]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = toy_loss(model(x), y)
        loss.backward()
        return loss

    with pytest.raises(DriveError, match="LBFGS.*AdamW"):
        attach(model, optimizer) if how == "attach" else optimizer.step(closure)
    torch.testing.assert_close(live(model), before, rtol=0, atol=0)


class Around(Optimizer):
    """An optimizer around another one (look-ahead and the like): both fire their hooks in every step."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure=None):
        return self.inner.step()


@pytest.mark.filterwarnings("ignore:the birth learning rate is exact")
def test_an_optimizer_inside_another_counts_once(straight):
    model = adapted()
    controller, _ = train(model, make=lambda params: Around(adamw(params)))
    assert controller.step == STEPS
    assert_equal_runs(model, straight)


def test_hooks_run_twice_count_once(straight):
    """accelerate's wrapper and an explicit attach, several times, in mid-run: one controller, one count."""
    from accelerate import Accelerator

    model = adapted(total_steps=STEPS)
    accelerator = Accelerator(cpu=True)
    wrapped = accelerator.prepare(adamw(trainable(model)))
    for step, [(x, y)] in enumerate(toy_batches(1, STEPS)):
        if step % 4 == 0:
            controller = attach(model, wrapped, record=True)
            assert controller.step == step and controller.follows(wrapped.optimizer)
        accelerator.backward(toy_loss(model(x), y))
        wrapped.step()
        wrapped.zero_grad()
    assert controller.step == len(controller.records) == STEPS
    assert_equal_runs(model, straight)


def test_a_step_without_a_backward_pass_does_not_count():
    model = adapted()
    optimizer = adamw(trainable(model))
    attach(model, optimizer)
    optimizer.step()
    with torch.no_grad():
        model(toy_batches(1, 1)[0][0][0])
    optimizer.step()
    assert controller_of(model).step == 0


# -- refusals ----------------------------------------------------------------------------------------------------------


def step_with(model: nn.Module, optimizer: Optimizer) -> None:
    x, y = toy_batches(1, 1)[0][0]
    toy_loss(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_an_old_optimizer_stepping_after_a_new_one():
    model = adapted()
    old, new = adamw(trainable(model)), adamw(trainable(model))
    step_with(model, old)
    step_with(model, new)
    before = live(model)
    with pytest.raises(DriveError, match="two optimizers step the parameters of blocks.0.up"):
        step_with(model, old)
    torch.testing.assert_close(live(model), before, rtol=0, atol=0)


def test_an_optimizer_that_holds_only_some_parameters():
    model = adapted()
    params = trainable(model)
    with pytest.raises(DriveError, match=r"blocks\.0\.up\.lora_A0 is not in the optimizer"):
        step_with(model, adamw(params[1:]))
    named = dict(model.named_parameters())
    late = next(p for n, p in named.items() if n.endswith("blocks.1.down.lora_delta.default.lora_B3"))
    with pytest.raises(DriveError, match=r"blocks\.1\.down\.lora_B3"):
        step_with(adapted_again := model, adamw([p for p in params if p is not late]))
    assert not controller_of(adapted_again).driven


@pytest.mark.parametrize("uses", [1, 3])
def test_an_adapter_nobody_drives(uses):
    """64 backward passes, however often a pass uses a module."""
    model = adapted()
    x, y = toy_batches(1, 1)[0][0]
    passes = 0
    with pytest.raises(DriveError, match=f"blocks.2.down: {PATIENCE} backward passes.*attach"):
        for _ in range(2 * PATIENCE):
            sum(toy_loss(model(x), y) for _ in range(uses)).backward()
            passes += 1
            for p in trainable(model):
                p.grad = None  # by hand, as a home-made optimizer would
    assert passes == PATIENCE


def test_long_accumulation_is_no_neglect():
    model = adapted()
    optimizer = adamw(trainable(model))
    attach(model, optimizer)
    x, y = toy_batches(1, 1)[0][0]
    for _ in range(PATIENCE + 3):
        toy_loss(model(x), y).backward()
    optimizer.step()
    assert controller_of(model).step == 1


@pytest.mark.parametrize("option", ["warmup_steps", "interval_steps", "birth_warmup"])
def test_a_share_of_an_unknown_run(option):
    model = adapted(**{option: 0.25})
    before = live(model)
    with pytest.raises(ScheduleError, match=r"total_steps.*attach\(.*Trainer"):
        step_with(model, adamw(trainable(model)))
    torch.testing.assert_close(live(model), before, rtol=0, atol=0)
    assert not controller_of(model).driven


def test_a_schedule_that_cannot_reach_its_budget():
    model = adapted(total_steps=6)
    before = live(model)
    with pytest.raises(ScheduleError, match="4 of 6 ranks would be missing"):
        step_with(model, adamw(trainable(model)))
    with pytest.raises(ScheduleError, match="4 of 6 ranks would be missing"):
        attach(model, adamw(trainable(model)))
    torch.testing.assert_close(live(model), before, rtol=0, atol=0)
    step_with(model, attach_with(model, total_steps=9))
    assert controller_of(model).step == 1


def attach_with(model: nn.Module, **options) -> Optimizer:
    optimizer = adamw(trainable(model))
    attach(model, optimizer, **options)
    return optimizer


def test_nothing_to_attach():
    with pytest.raises(DriveError, match="0 trainable adaptive adapters.*get_peft_model"):
        attach(nn.Linear(2, 2), Adam(nn.Linear(2, 2).parameters()))


def test_scores_are_those_of_the_library():
    """The recorded number is `delta_sensitivity` of the module, nothing more."""
    model = adapted(orthogonality=0.0)
    train(model, steps=1)
    controller = controller_of(model)
    delta, layer = controller.deltas[0], model.base_model.model.blocks[0].up
    x, y = toy_batches(5, 1)[0][0]
    kept: list[Tensor] = []
    hook = layer.register_forward_hook(lambda m, a, out: (out.retain_grad(), kept.append(out), None)[2])
    toy_loss(model(x), y).backward()
    hook.remove()
    expected = delta_sensitivity(*delta.factors(), x, kept[0].grad)
    torch.testing.assert_close(controller.rules[0].module_score(0), expected, rtol=1e-12, atol=0)
