"""How the input of a module meets A: as vectors, as token numbers, or as the patches of an image.

    vectors    x (…, in)                    h = A x                            linear maps
    tokens     x (…), whole numbers         h = A[:, x]: x stands for one-hot  embeddings; `in` is the vocabulary
    patches    x (N, C, H, W)               h = conv(x, rows of A as kernels)  convolutions; `in` is C · kh · kw

Whatever the input is, ΔW = B A is a matrix (out, in), y + ΔW x is formed from the factors alone, and scores and
statistics see the matrix X whose rows are the vectors, one-hot vectors or patches.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.fused_linear import Pending, add_product, computed, matched


class Inputs:
    """Abstract. The methods are written for vectors; the others say where they differ."""

    def dropped(self, x: Tensor, dropout: nn.Module) -> Tensor:
        """x after dropout, where it can have one."""
        dropped: Tensor = dropout(x)
        return dropped

    def add_product(self, y: Tensor | Pending, x: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
        """y + s B A x, in the dtype of y."""
        return add_product(y, x, A, B, scale)

    def rows(self, x: Tensor) -> Tensor:
        """X, or what stands for it."""
        return x.reshape(-1, x.shape[-1])

    def gradients(self, grad: Tensor) -> Tensor:
        """D (N, out): the gradient of the output for each row of X."""
        return grad.reshape(-1, grad.shape[-1])

    def used_columns(self, A: Tensor, X: Tensor, D: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """(A, X, D) without the columns of A that no input meets; X None: the identity."""
        return A, X, D

    def square_sums(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Σ over rows of X_j², for each of the `in` columns."""
        return torch.linalg.vector_norm(self.rows(x), dim=0, dtype=dtype).square_()

    def as_weight(self, delta: Tensor) -> Tensor:
        """ΔW in the layout of the base weight."""
        return delta


@dataclass(frozen=True)
class Vectors(Inputs):
    """x (…, in) as it is.   transposed: the base weight is stored as (in, out), as in GPT-2's Conv1D."""

    transposed: bool = False

    def as_weight(self, delta: Tensor) -> Tensor:
        return delta.t() if self.transposed else delta


@dataclass(frozen=True)
class Tokens(Inputs):
    """Token numbers of an embedding.

    Attributes:
        size: rows of the embedding, `in`.   padding: the row that is never trained.
        gain: factor that the module multiplies its rows with (Gemma's √d).
    """

    size: int = 0
    padding: int | None = None
    gain: float = 1.0

    def dropped(self, x: Tensor, dropout: nn.Module) -> Tensor:
        return x

    def add_product(self, y: Tensor | Pending, x: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
        h = nn.functional.embedding(x, A.t(), padding_idx=self.padding)
        y = computed(y)
        return y + (nn.functional.linear(h, B) * (self.gain * scale)).to(y.dtype)

    def rows(self, x: Tensor) -> Tensor:
        return x.flatten()

    def gradients(self, grad: Tensor) -> Tensor:
        return super().gradients(grad) * self.gain

    def used_columns(self, A: Tensor, X: Tensor, D: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        if self.padding is not None:
            D = D.masked_fill(X.eq(self.padding).unsqueeze(1), 0)
        tokens, position = X.unique(return_inverse=True)
        D = D.to(torch.promote_types(D.dtype, torch.float32))  # as a product sums over rows
        return A[:, tokens], None, D.new_zeros(len(tokens), D.shape[1]).index_add_(0, position, D)

    def square_sums(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        found = torch.zeros(self.size, dtype=dtype, device=x.device)
        return found.index_add_(0, x.flatten(), torch.ones(x.numel(), dtype=dtype, device=x.device))

    def as_weight(self, delta: Tensor) -> Tensor:
        return delta.t()


@dataclass(frozen=True)
class Patches(Inputs):
    """Patches of an image (…, C, H, W), as nn.Conv2d takes them.

    Attributes:
        channels: C.   kernel, stride, dilation: (height, width).
        padding: left, right, top, bottom.   mode: of padding, as nn.Conv2d names it.
    """

    channels: int = 0
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    mode: str = "zeros"

    def add_product(self, y: Tensor | Pending, x: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
        kernels = A.view(-1, self.channels, *self.kernel)
        h = nn.functional.conv2d(self._padded(matched(x, A)), kernels, stride=self.stride, dilation=self.dilation)
        y = computed(y)
        return y + nn.functional.conv2d(h, (B * scale)[:, :, None, None]).to(y.dtype)

    def _padded(self, x: Tensor) -> Tensor:
        if not any(self.padding):
            return x
        return nn.functional.pad(x, self.padding, mode="constant" if self.mode == "zeros" else self.mode)

    def rows(self, x: Tensor) -> Tensor:
        patches = nn.functional.unfold(self._padded(x), self.kernel, dilation=self.dilation, stride=self.stride)
        return patches.movedim(-2, -1).reshape(-1, patches.shape[-2])

    def gradients(self, grad: Tensor) -> Tensor:
        return grad.movedim(-3, -1).reshape(-1, grad.shape[-3])

    def as_weight(self, delta: Tensor) -> Tensor:
        return delta.view(-1, self.channels, *self.kernel)


VECTORS = Vectors()
FORMS: dict[str, Any] = {form.__name__.lower(): form for form in (Vectors, Tokens, Patches)}


def as_json(inputs: Inputs) -> dict[str, Any]:
    """Plain data that `from_json` reads."""
    return {"form": type(inputs).__name__.lower(), **vars(inputs)}


def from_json(found: dict[str, Any]) -> Inputs:
    """The inputs that `as_json` described. Raises KeyError or TypeError for anything else."""
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items() if key != "form"}
    inputs: Inputs = FORMS[found["form"]](**values)
    return inputs
