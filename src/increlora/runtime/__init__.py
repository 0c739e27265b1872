"""What happens to the training run: one controller per adapter, driven by two optimizer hooks."""

from .attach import attach_controller, controllers_of, register, regularization_loss
from .controller import Controller

__all__ = ["Controller", "attach_controller", "controllers_of", "register", "regularization_loss"]
