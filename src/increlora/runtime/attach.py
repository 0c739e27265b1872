"""How a controller finds its optimizer: torch's global optimizer hooks, installed with the first controller."""

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..deltas import Delta
from ..errors import DriveError
from .controller import Controller
from .penalty import penalty_value

_numbers = itertools.count()  # controllers are visited in the order of their making, the same on every process
_controllers: "weakref.WeakValueDictionary[int, Controller]" = weakref.WeakValueDictionary()
_found: "weakref.WeakKeyDictionary[Optimizer, tuple[tuple[int, ...], list[weakref.ref[Controller]]]]" = (
    weakref.WeakKeyDictionary()
)
_stepping: "weakref.WeakKeyDictionary[Optimizer, list[Controller]]" = weakref.WeakKeyDictionary()
_latest = -1  # number of the controller made last
_installed = False


def register(controller: Controller) -> Controller:
    """Let this controller be found by the optimizer that holds its parameters.

    The hooks are not for compilers: one that traced them would take what they do once for what they always do."""
    global _installed, _latest
    _latest = next(_numbers)
    _controllers[_latest] = controller
    if not _installed:
        register_optimizer_step_pre_hook(torch.compiler.disable(_before))
        register_optimizer_step_post_hook(torch.compiler.disable(_after))
        _installed = True
    return controller


def controllers_of(model: nn.Module) -> list[Controller]:
    """Controllers with modules in this model, in the order of their first module; not those of adapters that nobody may
    train."""
    found: dict[int, Controller] = {}
    known = {id(c) for c in _controllers.values()}
    for module in model.modules():
        controller: Any = getattr(getattr(module, "observer", None), "controller", None)
        if isinstance(module, Delta) and id(controller) in known and not controller.refusal:
            found[id(controller)] = controller
    return list(found.values())


def attach_controller(
    model: nn.Module, optimizer: Optimizer, *, total_steps: int | None = None, record: bool = False
) -> Controller:
    """Attach the trainable adapter of a model to its optimizer, explicitly."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps the optimizer that steps
    candidates = [c for c in controllers_of(model) if any(p.requires_grad for p in c.parameters())]
    if len(candidates) != 1:
        remedy = (
            "set one with set_adapter"
            if candidates
            else "call get_peft_model with one of increlora's configs first, or load an adapter with is_trainable=True"
        )
        raise DriveError(f"attach: the model has {len(candidates)} trainable adaptive adapters, expected one: {remedy}")
    return candidates[0].attach(optimizer, total_steps=total_steps, record=record)


def regularization_loss(model: nn.Module) -> Tensor:
    """The penalty of the trainable adapters, differentiable, for loops that clip gradients themselves:
    `loss = task_loss + regularization_loss(model)`. The step then does not add it once more.

    Divide it by nothing: under gradient accumulation add it to one micro-batch only."""
    total: Tensor | None = None
    for controller in controllers_of(model):
        if controller.method.penalty is not None:
            value = penalty_value(controller.deltas, controller.method.penalty)
            controller.penalty_given |= is_grad_enabled()  # a look at its value adds no gradient
            total = value if total is None else total + value
    if total is None:
        raise DriveError(
            "regularization_loss: no adapter of this model has a penalty; set its weight, `orthogonality` (SoRA: "
            "`gate_penalty`), above 0"
        )
    return total


def _owners(optimizer: Optimizer) -> list[Controller]:
    """Controllers that follow this optimizer, attaching those whose parameters it holds and nobody follows yet."""
    owners = []
    for controller in _holders(optimizer):
        if not controller.follows(optimizer):
            if not controller.used or controller.stepping:  # idle, or inside the step of an optimizer around this one
                continue
            controller.attach(optimizer)
        owners.append(controller)
    return owners


def _holders(optimizer: Optimizer) -> list[Controller]:
    """Controllers that follow this optimizer, or could. Looked up anew only when a controller was made or the groups
    have changed: many models may live in one process, and this runs twice a step."""
    key = (_latest, *(len(group["params"]) for group in optimizer.param_groups))
    if _found.get(optimizer, ((),))[0] != key:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        holders = [c for c in _controllers.values() if any(id(p) in held for p in c.parameters())]
        _found[optimizer] = key, [weakref.ref(c) for c in holders]
    return [c for known in _found[optimizer][1] if (c := known()) is not None]


def _tell_others(optimizer: Optimizer, holders: list[Controller]) -> None:
    """Tell the controllers that no optimizer has reached yet of a step that passes them by."""
    for controller in [c for c in _controllers.values() if not c.driven and c not in holders]:
        controller.stepped_by(optimizer)


def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    _tell_others(optimizer, holders := _holders(optimizer))
    if closure is None:
        _stepping[optimizer] = [c for c in _owners(optimizer) if c.before_step(optimizer)]
        return None
    if not holders:
        return None

    def observed() -> Any:  # gradients exist only once the closure has run
        loss = closure()
        _stepping[optimizer] = [c for c in _owners(optimizer) if c.before_step(optimizer)]
        return loss

    return (args[0], observed, *args[2:]), {k: v for k, v in kwargs.items() if k != "closure"}


def _after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    stepped = _stepping.pop(optimizer, [])
    for controller in _holders(optimizer):
        if any(controller is c for c in stepped):
            controller.after_step()
        elif not controller.stepping:
            controller.forget_fake_step(optimizer)
