"""What happens inside a backward pass: rules see what meets there, module by module."""

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..deltas import Delta
from ..errors import DriveError
from ..ops.parallel import in_process_group, is_sharded, joins_unevenly
from . import compiled
from .ownership import NOT_HELD, holder_of

if TYPE_CHECKING:
    from .controller import Controller

MOVES = 2  # changes between such passes that are no step: checkpoints are loaded, starts are set
PATIENCE = 64  # backward passes an adaptive adapter waits for an optimizer that holds its parameters


class OutputTap(torch.autograd.Function):
    """Identity on y + branch; its backward hands (x, ∂L/∂y = ∂L/∂branch) to the watcher.

    A custom function, not a tensor hook: under gradient checkpointing x is recomputed instead of kept, and backward
    runs once per use with either kind of checkpointing.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, watcher: "Watcher") -> Tensor:
        ctx.save_for_backward(x)
        ctx.watcher = watcher
        if y._is_view():  # what is marked as changed must be no view of something else
            return y.clone()
        ctx.mark_dirty(y)  # it is not, but models may change a layer's output in place, which a view would forbid
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.watcher.see_gradients(x.detach(), grad.detach())
        return grad, None, None


class InputTap(torch.autograd.Function):
    """Identity on A; its backward, once per use of the module, hands the input to the watcher.

    A, not x: where nothing before the module is trained, x needs no gradient and has no backward pass."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, x: Tensor, watcher: "Watcher") -> Tensor:
        ctx.save_for_backward(x)
        ctx.watcher = watcher
        return A.view_as(A)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.watcher.see_inputs(x.detach())
        return grad, None, None


class Watcher:
    """Observer of one module: hands what backward passes see of it to the rules that want it."""

    copied = False

    def __init__(self, controller: "Controller", index: int) -> None:
        self.controller, self.index = controller, index
        self.key = compiled.register(self)
        self.passes, self.task = 0, -1  # backward passes without an optimizer, and the last of them
        self.moves, self.version = 0, -1  # how often a parameter has changed since, by hand
        self.seen, self.latest = False, -1  # a backward pass since the last step, and the last of them

    @property
    def step(self) -> int | None:
        return self.controller.step if self.controller.driven else None

    def loaded(self, step: int) -> None:
        self.controller.loaded(step, self.index)

    def wants_gradients(self) -> bool:
        begins = not torch.compiler.is_compiling() and not self.controller.used
        self.controller.used, self.controller.stepping = True, False
        if torch.compiler.is_compiling():  # what changes with every step would make it compile with every step
            return self.controller.may_see_gradients
        if begins and in_process_group():
            self._check_even()
        return self.controller.sees_gradients

    def rests(self) -> None:
        self.controller.rested = True

    def _check_even(self) -> None:
        """Raise DriveError if processes may step without this one while there is something to decide."""
        if joins_unevenly() and not self.controller.finished:
            raise DriveError(
                f"{self.controller.names[self.index]}: under DDP's join() a process whose data has ended decides "
                f"nothing, but ranks are decided by all together: give every process as many batches (drop_last=True, "
                f"accelerate's even_batches), or end together by join(throw_on_early_termination=True)"
            )

    def _begin(self) -> None:
        """A backward pass: were the gradients of the one before cleared without a step? (Loss scaling skips, an
        optimizer raises, users drop batches.) Under FSDP2 they may wait elsewhere: nothing can be concluded there."""
        task, p = torch._C._current_graph_task_id(), self.controller.parameter(self.index)
        if self.seen and task != self.latest and p.grad is None and not is_sharded(p):
            self.controller.forget()
        self.seen, self.latest = True, task

    def tap_input(self, A: Tensor, x: Tensor) -> Tensor:
        if not self.controller.sees_inputs:
            return A
        return compiled.tap(A, x, self.key, "inputs") if torch.compiler.is_compiling() else InputTap.apply(A, x, self)

    def tap_output(self, y: Tensor, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return compiled.tap(y, x, self.key, "gradients")
        return OutputTap.apply(y, x, self)

    def see_inputs(self, x: Tensor) -> None:
        self._begin()
        for rule in self.controller.rules:
            if "inputs" in rule.wants:
                rule.see_inputs(self.index, x)

    def see_gradients(self, x: Tensor, grad: Tensor) -> None:
        """One backward pass of the module: its input x, and the gradient of its output."""
        self._begin()
        self._count_pass()
        for rule in self.controller.rules:
            if "gradients" in rule.wants:
                rule.see_gradients(self.index, x, grad)

    def _count_pass(self) -> None:
        """Raise DriveError if nobody steps, or others do that know nothing of us."""
        if self.controller.driven:
            self.passes = self.moves = 0
            return
        task, version = torch._C._current_graph_task_id(), self.controller.parameter(self.index)._version
        if task != self.task:
            self.passes += 1
            self.moves += self.passes > 1 and version != self.version
        self.task, self.version = task, version
        if (self.passes > PATIENCE or self.moves > MOVES) and holder_of(self.controller.parameters()) is not None:
            self.passes, self.moves = 1, 0  # it accumulates long
        if self.passes > PATIENCE or self.moves > MOVES or (self.passes > 1 and self.controller.passed_over()):
            name, before = self.controller.names[self.index], self.passes - 1
            raise DriveError(f"{name}: {before} backward pass{'es' * (before > 1)} and no step {NOT_HELD}")

    def source(self) -> Delta | None:
        return self.controller.deltas[self.index] if self.controller.driven else None

    def __deepcopy__(self, memo: dict[int, object]) -> "Orphan":
        return Orphan(weakref.ref(self.controller.deltas[self.index]))

    def __reduce__(self) -> tuple[type["Orphan"], tuple[()]]:
        return Orphan, ()


class Orphan:
    """Observer of a copied or unpickled module, which has no controller: training it is an error."""

    copied, step = True, None  # the module's state says the step

    def __init__(self, source: "weakref.ref[Delta] | None" = None) -> None:
        self._source = source

    def source(self) -> Delta | None:
        return self._source() if self._source is not None else None

    def __deepcopy__(self, memo: dict[int, object]) -> "Orphan":
        return Orphan(self._source)

    def __reduce__(self) -> tuple[type["Orphan"], tuple[()]]:
        return Orphan, ()

    def wants_gradients(self) -> bool:
        return True

    def tap_input(self, A: Tensor, x: Tensor) -> Tensor:
        return A

    def tap_output(self, y: Tensor, x: Tensor) -> Tensor:
        return OutputTap.apply(y, x, self)

    def see_gradients(self, x: Tensor, grad: Tensor) -> None:
        raise DriveError(
            "this adaptive adapter is a copy (copy.deepcopy or pickle) and nobody drives it: call "
            "`increlora.attach(model, optimizer, total_steps=…)` before training it"
        )

    def rests(self) -> None:
        pass

    def loaded(self, step: int) -> None:
        pass
