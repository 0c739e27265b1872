"""The penalty in plain loops: a gradient, added once, never part of a loss that somebody reports."""

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from increlora import attach, regularization_loss
from increlora.decide.penalties import orthogonality
from increlora.deltas import Status
from increlora.errors import DriveError
from increlora.runtime.penalty import components
from tests.reference.toy import toy_batches, toy_loss
from tests.unit.runtime.test_steps import adapted, controller_of, live, train, trainable

WEIGHT = 0.5


def penalised(**options) -> nn.Module:
    return adapted(**{"orthogonality": WEIGHT, "init_lora_weights": False} | options)


def one_step(model: nn.Module, *, add: int = 0, accumulation: int = 1, clip: float | None = None) -> dict[str, Tensor]:
    """Live parameters after one SGD step with learning rate 1; `add`: micro-batches with regularization_loss."""
    optimizer = SGD(trainable(model), lr=1.0)
    attach(model, optimizer)
    x, y = toy_batches(1, 1)[0][0]
    for i, (part_x, part_y) in enumerate(zip(x.chunk(accumulation), y.chunk(accumulation))):
        loss = toy_loss(model(part_x), part_y) / accumulation
        if i < add:
            loss = loss + regularization_loss(model)
        loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(trainable(model), clip)
    optimizer.step()
    return live(model)


def gradient_of_penalty(form: str) -> dict[str, Tensor]:
    """By autograd, straight from the formula."""
    model = penalised(orthogonality_form=form)
    controller = controller_of(model)
    (WEIGHT * orthogonality(components(controller.deltas), form=form)).backward()
    return {f"{d.name}.{x}0": d.block(0)[x].grad for d in controller.deltas for x in "AB"}


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("form", ["trainer", "squared"])
def test_it_adds_its_gradient_once_whatever_the_accumulation(form, accumulation):
    moved = one_step(penalised(orthogonality_form=form), accumulation=accumulation)
    plain = one_step(penalised(orthogonality=0.0), accumulation=accumulation)
    for name, grad in gradient_of_penalty(form).items():
        torch.testing.assert_close(plain[name] - moved[name], grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(moved["blocks.0.up.E0"], plain["blocks.0.up.E0"], rtol=0, atol=0)


@pytest.mark.parametrize("place", ["after_clipping", "before_clipping"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_what_the_loop_adds_itself_is_not_added_again(place, accumulation):
    given = one_step(penalised(penalty_place=place), add=1, accumulation=accumulation)
    left_to_us = one_step(penalised(penalty_place=place), accumulation=accumulation)
    torch.testing.assert_close(given, left_to_us, rtol=1e-9, atol=1e-12)


def test_clipping_sees_what_the_loop_adds_itself():
    start = live(penalised())
    clipped, after = one_step(penalised(), add=1, clip=1e-9), one_step(penalised(), clip=1e-9)
    name = "blocks.0.up.A0"
    torch.testing.assert_close(clipped[name], start[name], rtol=0, atol=1e-8)
    torch.testing.assert_close(start[name] - after[name], gradient_of_penalty("trainer")[name], rtol=1e-6, atol=1e-8)


def test_it_is_added_again_in_the_next_step():
    """What the loop gave in one step does not excuse the next one."""
    both = []
    for add in (1, 0):
        model = penalised()
        optimizer = SGD(trainable(model), lr=0.1)
        for step, [(x, y)] in enumerate(toy_batches(1, 3)):
            optimizer.zero_grad()
            loss = toy_loss(model(x), y)
            (loss + regularization_loss(model) if add and step == 0 else loss).backward()
            optimizer.step()
        both.append(live(model))
    torch.testing.assert_close(*both, rtol=1e-9, atol=1e-12)


def test_a_look_at_its_value_changes_nothing():
    model = penalised()
    with torch.no_grad():
        value = regularization_loss(model)
    assert value == WEIGHT * orthogonality(components(controller_of(model).deltas)) and value > 0
    torch.testing.assert_close(one_step(model), one_step(penalised()), rtol=0, atol=0)


def test_the_loss_does_not_contain_it():
    x, y = toy_batches(1, 1)[0][0]
    assert toy_loss(penalised()(x), y) == toy_loss(penalised(orthogonality=0.0)(x), y)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_loss_scaling_leaves_its_strength(fused, unscale):
    """Fused optimizers get gradients that are still scaled."""
    ends = []
    for scale in (None, 1024.0):
        model = penalised()
        optimizer = AdamW(trainable(model), lr=1e-2, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for [(x, y)] in toy_batches(1, 12):
            optimizer.zero_grad()
            scaler.scale(toy_loss(model(x), y)).backward()
            if unscale:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(trainable(model), 1.0)
            scaler.step(optimizer)
            scaler.update()
        ends.append(live(model))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


def test_idle_blocks_do_not_feel_it():
    """Dormant blocks and a frozen reserve stay where they are, however strong the penalty."""
    model = penalised(orthogonality=50.0, reserve="frozen")
    start = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    controller, _ = train(model, steps=5)
    active = {id(p) for d in controller.deltas for i in d.indices(Status.ACTIVE) for p in d.block(i).values()}
    idle = {n: p for n, p in model.named_parameters() if n in start and id(p) not in active}
    assert idle and len(idle) < len(start)
    torch.testing.assert_close({n: p.detach() for n, p in idle.items()}, {n: start[n] for n in idle}, rtol=0, atol=0)


def test_without_a_penalty_there_is_nothing_to_add():
    with pytest.raises(DriveError, match="orthogonality"):
        regularization_loss(adapted(orthogonality=0.0))
