"""Pruning of entries while a toy network is trained: what is seen and when, what is zero, and what leaves no trace."""

import copy

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from increlora import PlainLoraConfig, PriLoraConfig, attach
from increlora.deltas.state import pack_statistics, unpack_statistics
from increlora.errors import CheckpointError, DriveError
from increlora.runtime import Controller
from tests.reference.loop import adamw, controller_of, fused, trainable
from tests.reference.toy import toy_batches, toy_loss, toy_network
from tests.unit.rules.test_keep import Calls, entries, statistics, train

STEPS = 20
SHAPES = {"blocks.0.up": (2, 7), "blocks.0.down": (2, 12), "blocks.1.up": (2, 9), "blocks.1.down": (2, 9),
          "blocks.2.up": (2, 5), "blocks.2.down": (2, 14)}  # of A  # fmt: skip


def adapted(config=PriLoraConfig, **options) -> nn.Module:
    chosen = {"r": 2, "target_modules": ["up", "down"]}
    if config is PriLoraConfig:
        chosen |= {"first_r": 2.0, "interval_steps": 4, "total_steps": STEPS}
    with torch.random.fork_rng(devices=[]):
        return get_peft_model(toy_network(), config(**chosen | options))


def zeros(model: nn.Module) -> list[int]:
    """How many entries of A are zero, module by module."""
    return [int((delta.lora_A0 == 0).sum()) for delta in controller_of(model).deltas]


def pruned_now() -> list[int]:
    return [rows * (n // 2) for rows, n in SHAPES.values()]


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(p, entries(other)[n]) for n, p in entries(one).items())


# -- when, and how many ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "at"), [
    ({}, {4, 8, 12, 16, 20}), ({"warmup_steps": 4, "settle_steps": 0.2}, {8, 12, 16}),
    ({"interval_steps": 0.35}, {7, 14}),
])  # fmt: skip
def test_p6_exactly_half_of_every_row_is_zero_after_these_steps_and_nothing_after_others(options, at) -> None:
    model = adapted(**options)
    optimizer = adamw(trainable(model))
    for step in range(STEPS):
        train(model, optimizer=optimizer, start=step, steps=step + 1)
        assert zeros(model) == (pruned_now() if step + 1 in at else [0] * 6), step
    rows = [(delta.lora_A0 == 0).sum(dim=1) for delta in controller_of(model).deltas]
    assert 20 not in at or all((row == row[0]).all() for row in rows)
    assert [event.kind for event in controller_of(model).events] == ["finish"] * 6


def test_p6_the_same_entries_go_however_the_batch_is_cut() -> None:
    whole, cut = adapted(), adapted()
    train(whole), train(cut, accumulation=4)
    torch.testing.assert_close(statistics(cut), statistics(whole), rtol=1e-10, atol=1e-14)
    assert all(torch.equal(p == 0, entries(whole)[n] == 0) for n, p in entries(cut).items())


def test_the_matrix_as_a_group_prunes_another_choice_of_the_same_size() -> None:
    rows, matrix = adapted(), adapted(group="matrix")
    train(rows, steps=4), train(matrix, steps=4)
    assert zeros(matrix) == [r * n // 2 for r, n in SHAPES.values()] == [7, 12, 9, 9, 5, 14]
    uneven = [(d.lora_A0 == 0).sum(dim=1).tolist() for d in controller_of(matrix).deltas]
    assert any(one != other for one, other in uneven)


def test_zeros_regrow_unless_they_are_held() -> None:
    free, held = adapted(settle_steps=7), adapted(settle_steps=7, regrow=False)
    for model, kept in ((free, False), (held, True)):
        optimizer = train(model, steps=4)
        first = {n: p == 0 for n, p in entries(model).items() if "lora_A" in n}
        for step in range(4, STEPS):
            train(model, optimizer=optimizer, start=step, steps=step + 1)
            assert zeros(model) == (pruned_now() if kept or step in (7, 11) else [0] * 6)
        if kept:  # a zero is the least important of all: held once, held for good
            assert all(torch.equal(p == 0, first[n]) for n, p in entries(model).items() if n in first)


def test_the_optimizers_moments_are_not_touched() -> None:
    model, plain = adapted(), adapted(interval_steps=21, total_steps=None)
    states = [train(m, steps=4).state_dict()["state"] for m in (model, plain)]
    assert zeros(model) != zeros(plain)
    for one, other in zip(*(s.values() for s in states), strict=True):
        assert torch.equal(one["exp_avg"], other["exp_avg"]) and torch.equal(one["exp_avg_sq"], other["exp_avg_sq"])


# -- plain LoRA --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {"prune_share": 0.0}, {"interval_steps": 21, "total_steps": None}, {"prune_share": 0.05},
    {"prune_share": 0.0, "scaling": "constant"},
])  # fmt: skip
def test_p8_without_pruning_and_ramp_it_is_lora_bit_for_bit(options: dict) -> None:
    """Observed or not, and with a share that comes to no entry at all."""
    ours, plain = adapted(**options), adapted(PlainLoraConfig)
    assert same(ours, plain)
    train(ours), train(plain)
    assert same(ours, plain)


# -- what is seen ------------------------------------------------------------------------------------------------------


def test_norms_are_those_of_the_input_before_dropout() -> None:
    model = adapted(lora_dropout=0.5)
    with torch.random.fork_rng(devices=[]):
        train(model, steps=1)
    x = toy_batches(1, STEPS)[0][0][0]
    first = controller_of(model).deltas[0].statistics[0]
    torch.testing.assert_close(first[:-1], torch.linalg.vector_norm(x, dim=0), rtol=1e-12, atol=0)


def test_p9_evaluation_and_disabled_adapters_are_not_seen() -> None:
    model, quiet = adapted(), adapted()
    x = toy_batches(9, 1)[0][0][0]

    def look(step: int, model: nn.Module) -> None:
        with torch.no_grad():
            model(x)
        model.eval()(x)  # with a graph, and no backward pass
        with model.disable_adapter():
            model.train()(x)

    train(model, before=look), train(quiet)
    assert torch.equal(statistics(model), statistics(quiet)) and same(model, quiet)


class Checkpointed(nn.Module):
    """The toy network with recomputed blocks."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = toy_network(), reentrant
        self.blocks = self.inner.blocks

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()  # the reentrant kind needs it
        for i, block in enumerate(self.blocks):
            x = checkpoint(lambda x, b=block: b.down(torch.tanh(b.up(x))), x, use_reentrant=self.reentrant)
            x = torch.tanh(x) if i < 2 else x
        return x


@pytest.mark.parametrize("reentrant", [True, False])
def test_p9_recomputed_forward_passes_count_once(reentrant: bool) -> None:
    plain = adapted()
    with torch.random.fork_rng(devices=[]):
        config = PriLoraConfig(r=2, first_r=2.0, interval_steps=4, total_steps=STEPS, target_modules=["up", "down"])
        model = get_peft_model(Checkpointed(reentrant), config)
    for one, other in zip(controller_of(model).deltas, controller_of(plain).deltas, strict=True):
        one.load_state_dict(other.state_dict())  # initial values depend on the modules' names
    train(plain, accumulation=2), train(model, accumulation=2)
    torch.testing.assert_close(statistics(model), statistics(plain), rtol=1e-12, atol=0)
    assert zeros(model) == zeros(plain)


class Shared(nn.Module):
    """One module used twice in a forward pass, and one that is used only now and then."""

    def __init__(self) -> None:
        super().__init__()
        network = toy_network()
        self.square, self.rare = network.blocks[1].up, nn.Linear(9, 3)
        self.sometimes = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.square(torch.tanh(self.square(x)))
        return self.rare(y) if self.sometimes else y[:, :3]


def shared(**options) -> nn.Module:
    config = {"r": 2, "target_modules": ["square", "rare"], "interval_steps": 2} | options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(Shared().double(), PriLoraConfig(**config))


def one_step(model: nn.Module, optimizer, seed: int = 0) -> Tensor:
    x = torch.randn(8, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
    return x


def test_every_use_of_a_module_counts() -> None:
    model = shared()
    with torch.no_grad():
        base = model.base_model.model.square.base_layer
    x = one_step(model, SGD(trainable(model), lr=0.0))
    both = torch.cat([x, torch.tanh(base(x))])
    found = controller_of(model).deltas[0].statistics[0][:-1]
    torch.testing.assert_close(found, torch.linalg.vector_norm(both, dim=0).detach(), rtol=1e-12, atol=0)


def test_a_module_that_is_not_used_keeps_its_norms_and_one_never_used_its_entries() -> None:
    model = shared()
    optimizer = SGD(trainable(model), lr=0.1)
    model.base_model.model.sometimes = False
    for seed in range(2):
        one_step(model, optimizer, seed)
    square, rare = controller_of(model).deltas
    assert (square.lora_A0 == 0).sum() == 8 and not (rare.lora_A0 == 0).any() and not rare.statistics[0].any()
    model.base_model.model.sometimes = True
    one_step(model, optimizer, 2)
    before = rare.statistics[0].clone()
    model.base_model.model.sometimes = False
    one_step(model, optimizer, 3)
    assert torch.equal(rare.statistics[0], before) and before[-1] == 1 and (rare.lora_A0 == 0).sum() == 8


def test_a_rarer_statistic_looks_at_every_so_many_steps() -> None:
    model = adapted(statistic_interval=3)
    optimizer = adamw(trainable(model))
    changed = []
    for step in range(10):
        before = statistics(model)
        train(model, optimizer=optimizer, start=step, steps=step + 1)
        changed.append(not torch.equal(statistics(model), before))
    assert [step for step, moved in enumerate(changed) if moved] == [0, 3, 6, 9]


# -- what leaves no trace ----------------------------------------------------------------------------------------------


def test_a_backward_pass_that_led_to_no_step_is_forgotten() -> None:
    model, straight = adapted(), adapted()
    optimizer, other = adamw(trainable(model)), adamw(trainable(straight))
    wrong = toy_batches(5, 1)[0][0]
    for step in range(3):
        toy_loss(model(100 * wrong[0]), wrong[1]).backward()  # the next one begins by clearing its gradients
        train(model, optimizer=optimizer, start=step, steps=step + 1)
        train(straight, optimizer=other, start=step, steps=step + 1)
    assert torch.equal(statistics(model), statistics(straight)) and same(model, straight)


@pytest.mark.parametrize("make", [adamw, fused])
def test_a_step_that_loss_scaling_skips_is_forgotten(make) -> None:
    model, straight = adapted(total_steps=None), adapted(total_steps=None)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer, other = make(trainable(model)), make(trainable(straight))

    def spoil(step: int, model: nn.Module) -> None:
        controller_of(model).deltas[0].lora_A0.grad[0, 0] = torch.inf

    for step in range(6):
        train(model, optimizer=optimizer, start=step, steps=step + 1, scaler=scaler)
        train(straight, optimizer=other, start=step, steps=step + 1)
        if step in (1, 3):
            train(model, optimizer=optimizer, start=9, steps=10, scaler=scaler, before=spoil)
    assert controller_of(model).step == 6
    torch.testing.assert_close(statistics(model), statistics(straight), rtol=1e-12, atol=0)
    assert zeros(model) == zeros(straight)


def test_a_step_with_infinite_gradients_leaves_no_trace() -> None:
    model, seen = adapted(), {}

    def spoil(step: int, model: nn.Module) -> None:
        if step == 2:
            seen["before"] = statistics(model)
            controller_of(model).deltas[0].lora_A0.grad[0, 0] = torch.inf

    with pytest.warns(UserWarning, match="non-finite gradient"):
        train(model, steps=3, before=spoil)
    assert torch.equal(statistics(model), seen["before"])


# -- files and runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"regrow": False}, {"settle_steps": 9}, {"statistic_interval": 3}])
@pytest.mark.parametrize("stop", [1, 4, 7, 13])
def test_the_state_dict_alone_resumes_bitwise(stop: int, options: dict) -> None:
    straight, first, second = (adapted(**options) for _ in range(3))
    train(straight)
    optimizer = train(first, steps=stop)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    fresh = adamw(trainable(second))
    fresh.load_state_dict(optimizer.state_dict())
    train(second, optimizer=fresh, start=stop)
    assert same(second, straight) and torch.equal(statistics(second), statistics(straight))


def test_statistics_are_written_until_the_last_pruning_and_a_new_run_starts_afresh() -> None:
    model, key = adapted(settle_steps=5), "base_model.model.blocks.0.up.lora_statistics"
    optimizer = train(model, steps=11)
    assert len(get_peft_model_state_dict(model)[key]) == 2 + 8
    train(model, optimizer=optimizer, start=11, steps=12)
    assert key not in get_peft_model_state_dict(model)
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    before = statistics(model)
    train(model, optimizer=optimizer, start=12)
    assert torch.equal(statistics(model), before)  # nothing is left to be decided
    train(model, steps=1)  # a new optimizer, a new run: its first norms count in full
    x = toy_batches(1, STEPS)[0][0][0]
    found = controller_of(model).deltas[0].statistics[0]
    torch.testing.assert_close(found[:-1], torch.linalg.vector_norm(x, dim=0), rtol=1e-12, atol=0)
    assert not controller_of(model).deltas[0].state.settled
    assert {k: v.shape for k, v in model.state_dict().items()} == shapes


def test_a_run_that_became_longer_goes_on_from_what_it_hears() -> None:
    first, second = adapted(settle_steps=9), adapted(total_steps=40)
    train(first, steps=15)
    second.load_state_dict(first.state_dict())
    controller = attach(second, optimizer := adamw(trainable(second)))
    assert controller.step == 15 and not controller.rules[0].done
    train(second, optimizer=optimizer, start=15, steps=16)
    assert zeros(second) == pruned_now()


@pytest.mark.parametrize("options", [{"statistic_interval": 3}, {"settle_steps": 10}])
def test_going_back_to_an_earlier_state_hears_its_first_step(options: dict) -> None:
    straight, rolled_back = adapted(**options), adapted(**options)
    optimizer = train(rolled_back, steps=3)
    saved, moments = copy.deepcopy(rolled_back.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(rolled_back, optimizer=optimizer, start=3, steps=17)
    rolled_back.load_state_dict(saved)
    again = adamw(trainable(rolled_back))
    again.load_state_dict(moments)
    train(rolled_back, optimizer=again, start=3, steps=6)
    train(straight, steps=6)
    assert torch.equal(statistics(rolled_back), statistics(straight)) and same(rolled_back, straight)


def test_damaged_statistics_are_refused() -> None:
    model = adapted()
    train(model, steps=2)
    state = model.state_dict()
    key = next(k for k in state if k.endswith("_extra_state"))
    other = adapted()
    with pytest.raises(CheckpointError, match=r"lora_statistics \(\d+ entries\): the adapter file is damaged"):
        other.load_state_dict(state | {key: state[key][:-3]})
    short = [unpack_statistics(state[key])[0][:-3]]
    other.load_state_dict(state | {key: pack_statistics(short)})
    with pytest.raises(CheckpointError, match="blocks.0.up: 5 statistics were loaded, 8 are needed"):
        train(other, steps=3, start=2)


def test_training_that_nobody_drives_raises() -> None:
    model, (x, y) = adapted(), toy_batches(0, 1)[0][0]
    with pytest.raises(DriveError, match="64 backward passes"):
        for _ in range(70):
            toy_loss(model(x), y).backward()


def test_half_precision_weights_are_judged_in_float32() -> None:
    with torch.random.fork_rng(devices=[]):
        config = PriLoraConfig(r=2, target_modules=["up", "down"], interval_steps=2, first_r=2)
        model = get_peft_model(toy_network().bfloat16(), config, autocast_adapter_dtype=False)
    optimizer = SGD(trainable(model), lr=0.1)
    for [(x, y)] in toy_batches(1, 2, dtype=torch.bfloat16):
        toy_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert statistics(model).dtype == torch.float32 and zeros(model) == pruned_now()
    assert {p.dtype for p in entries(model).values()} == {torch.bfloat16}


# -- cost --------------------------------------------------------------------------------------------------------------


def calls_of(controller: Controller, step: int) -> list[str]:
    """Torch operations of the pruner after a step, in which module 0 was not used."""
    pruner = controller.rules[0]
    for i, delta in list(enumerate(controller.deltas))[1:]:
        pruner.see_inputs(i, torch.randn(3, delta.in_features, dtype=torch.float64))
    with Calls() as calls:
        pruner.after_step(step)
    pruner.forget()
    assert not any("_local_scalar" in name or "nonzero" in name or "item" in name for name in calls.names)
    silent = ("detach", "view", "split", "slice", "unsqueeze", "alias", "select.int", "unbind")
    return [name for name in calls.names if not any(word in name for word in silent)]


@pytest.mark.parametrize("regrow", [True, False])
def test_a_handful_of_calls_serve_all_modules_and_none_waits_for_the_device(regrow: bool) -> None:
    model = adapted(regrow=regrow)
    train(model, steps=6)
    model.train()
    controller = controller_of(model)
    between, pruning = calls_of(controller, 6), calls_of(controller, 7)
    assert len(between) <= 17 + (not regrow), between
    shapes = len(set(SHAPES.values()))
    assert len(pruning) - len(between) <= 16 * shapes


def test_the_calls_of_a_pruning_do_not_grow_with_the_modules() -> None:
    counts = []
    for copies in (1, 4):
        network = nn.Sequential(*(toy_network().blocks[1].up for _ in range(copies)))
        network = nn.ModuleDict({"layers": nn.Sequential(*(nn.ModuleDict({"up": m}) for m in network))})
        config = PriLoraConfig(r=2, target_modules=["up"], interval_steps=2, first_r=2)
        controller = controller_of(get_peft_model(network, config))
        attach(network, adamw(trainable(network)))
        counts.append(len(calls_of(controller, 1)))
    assert counts[1] == counts[0]
