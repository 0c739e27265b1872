"""What happens inside a backward pass: the score of a module, taken where input and output gradient meet."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..decide.scores import Norm, delta_sensitivity
from ..deltas import Delta
from ..errors import DriveError
from ..ops.parallel import full, is_sharded
from . import compiled

if TYPE_CHECKING:
    from .controller import Controller

PATIENCE = 64  # backward passes an adaptive adapter waits for an optimizer that holds its parameters


class ScoreTap(torch.autograd.Function):
    """Identity on y + branch; its backward hands (x, ∂L/∂y = ∂L/∂branch) to the watcher.

    A custom function, not a tensor hook: under gradient checkpointing x is recomputed instead of kept, and backward
    runs once per use with either kind of checkpointing.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, delta: Delta, watcher: "Watcher") -> Tensor:
        ctx.save_for_backward(x)
        ctx.delta, ctx.watcher = delta, watcher
        if y._is_view():  # what is marked as changed must be no view of something else
            return y.clone()
        ctx.mark_dirty(y)  # it is not, but models may change a layer's output in place, which a view would forbid
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.watcher.collect(ctx.delta, x.detach(), grad.detach())
        return grad, None, None, None


class InputTap(torch.autograd.Function):
    """Identity on A; its backward, once per use of the module, hands the input to the watcher.

    A, not x: where nothing before the module is trained, x asks for no gradient and would not be heard of again."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, x: Tensor, watcher: "Watcher") -> Tensor:
        ctx.save_for_backward(x)
        ctx.watcher = watcher
        return A.view_as(A)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.watcher.collect_input(x.detach())
        return grad, None, None


class Watcher:
    """Observer of one module: gathers its scores between two optimizer steps and reports them to the controller."""

    def __init__(self, controller: "Controller", index: int) -> None:
        self.controller, self.index = controller, index
        self.key = compiled.register(self)
        self.passes, self.task = 0, -1  # backward passes without an optimizer, and the last of them
        self.clear()

    def clear(self) -> None:
        self.calls = self.inputs = 0
        self.total: Tensor | None = None
        self.kept: list[tuple[Tensor, Tensor]] = []

    def wants(self) -> bool:
        self.controller.used, self.controller.stepping = True, False
        if torch.compiler.is_compiling():  # what changes with every step would make it compile with every step
            return self.controller.watching
        if (self.calls or self.inputs) and self._abandoned():
            if self.inputs:
                self.controller.forget_inputs()
            self.clear()
        return self.controller.tapping

    def _abandoned(self) -> bool:
        """Were the gradients of the last backward pass cleared without a step? (loss scaling skips, users drop batches)

        Under FSDP2 gradients may wait elsewhere while they accumulate, and checkpointed forward passes run inside a
        backward pass: nothing can be concluded there."""
        p = self.controller.parameter(self.index)
        return p.grad is None and not is_sharded(p) and torch._C._current_graph_task_id() < 0

    def see_input(self, A: Tensor, x: Tensor) -> Tensor:
        pruner = self.controller.pruner
        if pruner is None or not pruner.reads_inputs:
            return A
        return compiled.see(A, x, self.key) if torch.compiler.is_compiling() else InputTap.apply(A, x, self)

    def collect_input(self, x: Tensor) -> None:
        assert self.controller.pruner is not None
        self.inputs += 1
        self.controller.pruner.collect(self.index, x)

    def tap(self, delta: Delta, y: Tensor, x: Tensor) -> Tensor:
        return compiled.tap(y, x, self.key) if torch.compiler.is_compiling() else ScoreTap.apply(y, x, delta, self)

    def collect(self, delta: Delta, x: Tensor, grad: Tensor) -> None:
        """One backward call of the module: its input x, and the gradient of its output."""
        self.calls += 1
        self._count_pass()
        if self.passes > PATIENCE:
            raise DriveError(
                f"{self.controller.names[self.index]}: {PATIENCE} backward passes and no step of an optimizer that "
                f"holds its parameters: build the optimizer from model.parameters() after get_peft_model, or call "
                f"`increlora.attach(model, optimizer, total_steps=…)` before training"
            )
        rule = self.controller.method.score
        if rule is None or rule.kind != "delta":
            return
        x, grad = delta.inputs.rows(x), delta.inputs.gradients(grad)
        if rule.accumulate == "exact":
            self.kept.append((x, grad))
            return
        with torch.no_grad():
            score = sensitivity(delta, *delta.factors(), x, grad, norm=rule.norm)
        self.total = score if self.total is None or rule.accumulate == "last" else self.total + score

    def _count_pass(self) -> None:
        task = torch._C._current_graph_task_id()
        if self.controller.driven:
            self.passes = 0
        elif task != self.task:
            self.passes += 1
        self.task = task

    def score(self, delta: Delta) -> Tensor | None:
        """Score since the last step, or None if the module took no part."""
        rule = self.controller.method.score
        assert rule is not None
        if self.kept:
            x, grad = (torch.cat(parts) for parts in zip(*self.kept, strict=True))
            with torch.no_grad():  # outside the backward pass, where parameters may be sharded
                A, B = map(full, delta.factors())
                return sensitivity(delta, A, B, x, grad, norm=rule.norm)
        if self.total is None:
            return None
        return self.total if rule.accumulate == "last" else self.total / self.calls

    def state(self) -> list[float]:
        return self.controller.module_state(self.index)

    def load_state(self, values: list[float]) -> None:
        self.controller.load_module_state(self.index, values)

    def __deepcopy__(self, memo: dict[int, object]) -> "Orphan":
        return Orphan(self.state())

    def __reduce__(self) -> tuple[type["Orphan"], tuple[list[float]]]:
        return Orphan, (self.state(),)


def sensitivity(delta: Delta, A: Tensor, B: Tensor, X: Tensor, D: Tensor, *, norm: Norm) -> Tensor:
    """`delta_sensitivity` of a module, on the columns that its input meets."""
    A, met, D = delta.inputs.met(A, X, D)
    return delta_sensitivity(A, B, met, D, norm=norm, numel=delta.in_features * delta.out_features)


class Orphan:
    """Observer of a copied or unpickled module: it has no controller, and training it would be LoRA in disguise."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def wants(self) -> bool:
        raise DriveError(
            "this adaptive adapter is a copy (copy.deepcopy or pickle) and nobody drives it: call "
            "`increlora.attach(model, optimizer, total_steps=…)` before training it"
        )

    def see_input(self, A: Tensor, x: Tensor) -> Tensor:
        return A

    def tap(self, delta: Delta, y: Tensor, x: Tensor) -> Tensor:
        return y

    def state(self) -> list[float]:
        return self.values

    def load_state(self, values: list[float]) -> None:
        self.values = values
