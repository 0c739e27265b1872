"""torch.compile: one graph, compiled again where ranks have changed and nowhere else; the numbers of a plain run."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from increlora import AdaLoraConfig, IncreLoraConfig, PlainLoraConfig, PriLoraConfig, SoraConfig
from tests.hosts.tiny import Mlp, seeded

STEPS = 16
TIMES = {"warmup_steps": 2, "interval_steps": 4, "total_steps": STEPS}
CONFIGS = {
    "increlora": lambda **shared: IncreLoraConfig(r=3, top_h=2, score_window=2, **TIMES, **shared),
    "adalora": lambda **shared: AdaLoraConfig(r=3, settle_steps=5, **TIMES, **shared),
    "sora": lambda **shared: SoraConfig(r=3, settle_steps=5, close_after=None, **TIMES, **shared),
    "prilora": lambda **shared: PriLoraConfig(r=3, interval_steps=4, total_steps=STEPS, **shared),
    "lora": lambda **shared: PlainLoraConfig(r=3, **shared),
}


def built(method: str) -> PeftModel:
    return get_peft_model(seeded(Mlp).double(), CONFIGS[method](target_modules=["up", "down", "head"], seed=3))


def trained(model: PeftModel, forward, counter: CompileCounterWithBackend | None = None) -> list[int]:
    """Steps in which something was compiled."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    compiled = []
    for step in range(STEPS):
        before = counter.frame_count if counter else 0
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        forward(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        compiled += [step] * ((counter.frame_count if counter else 0) - before)
    return compiled


@pytest.fixture(autouse=True)
def forgotten():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("method", CONFIGS)
def test_a_compiled_model_trains_as_a_plain_one(method: str) -> None:
    plain, model = built(method), built(method)
    trained(plain, plain)
    counter = CompileCounterWithBackend("aot_eager")
    steps = trained(model, torch.compile(model, backend=counter, fullgraph=True), counter)
    events = sorted({event.step for event in controller_events(model)})
    assert set(steps) <= {0, 1} | {step + 1 for step in events}, (steps, events)
    assert len(steps) == len(set(steps)) and steps[0] == 0
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert method == "lora" or events


def controller_events(model: PeftModel) -> list:
    observers = [m.observer for m in model.modules() if getattr(m, "observer", None) is not None]
    return observers[0].controller.events if observers else []


def test_a_score_that_is_not_due_costs_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tap stays in the graph while ranks grow; whether it looks is decided when it is run."""
    taken: list[int] = []
    model = built("increlora")
    monkeypatch.setattr(
        "increlora.rules.grow.sensitivity",
        lambda *args, **kwargs: taken.append(1) or torch.ones((), dtype=torch.float64),
    )
    trained(model, torch.compile(model, backend="aot_eager", fullgraph=True))
    controller = next(m.observer.controller for m in model.modules() if getattr(m, "observer", None) is not None)
    events = sorted({event.step for event in controller.events if event.kind == "birth"})
    assert len(taken) == 3 * (1 + 2 * len(events))  # nobody knows at the first step when scores will be due


def test_a_compiled_average_of_weights_follows_the_ranks() -> None:
    model = built("increlora")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.0)).eval()
    compiled = torch.compile(average.module, backend="eager")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(STEPS):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=0)
    assert controller_events(model)


def test_settled_ranks_are_exported_and_mapped() -> None:
    model = built("adalora")
    trained(model, model)
    model.eval().requires_grad_(False)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exported = torch.export.export(model.base_model.model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x), rtol=1e-12, atol=0)
    state = {name: torch.stack([value] * 2) for name, value in model.named_parameters()}
    buffers = dict(model.named_buffers())
    mapped = torch.func.vmap(lambda p: torch.func.functional_call(model, (p, buffers), (x,)))(state)
    torch.testing.assert_close(mapped[1], model(x), rtol=1e-12, atol=1e-14)
