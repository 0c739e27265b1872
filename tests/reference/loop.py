"""What plain training loops in the tests share: the trained parameters, two optimizers, and the controller."""

from torch import nn
from torch.optim import AdamW

from increlora.runtime import Controller, controllers_of


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adamw(params) -> AdamW:
    return AdamW(params, lr=1e-2)


def fused(params) -> AdamW:
    return AdamW(params, lr=1e-2, fused=True)


def controller_of(model: nn.Module) -> Controller:
    (controller,) = controllers_of(model)
    return controller
