"""Moving averages of the norms of every module's input features, the same on every process.

    n_j = (Σ x_j²)^½        over all tokens of a step: micro-batches, uses of the module, processes
    N ← β N + (1 − β) n     for modules that were used; n the first time

N of all modules is one flat tensor, of which the modules' statistics are views; each ends with a 1 once its module was
used. So a step costs one reduction per distinct input, one collective, a handful of further calls, and no waiting.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..deltas import BlockDelta, Inputs, Vectors
from ..ops.parallel import in_process_group
from .base import dtype_of


class InputNorms:
    """Sums of squares since the last step, and N. Whether a module was used is counted on the device too, since in a
    process group only the sum over all processes tells."""

    def __init__(self, deltas: Sequence[BlockDelta], slot: int, *, beta: float) -> None:
        self.deltas, self.slot, self.beta = deltas, slot, beta
        self.sizes = [delta.in_features + 1 for delta in deltas]
        self.dtype = dtype_of(deltas[0])  # squares of half precision overflow above 255
        self.sums: dict[int, Tensor] = {}
        self.latest: tuple[Tensor, int, Tensor] | None = None  # an input, its version, its squares

    def lay_out(self, *, afresh: bool) -> None:
        """Gather the statistics in the flat tensor, where the parameters are; `afresh`: no module was used yet."""
        self.dtype = dtype_of(self.deltas[0])
        device = next(self.deltas[0].parameters()).device
        self.flat = torch.cat([delta.statistics[self.slot].to(device, self.dtype) for delta in self.deltas])
        if afresh:
            self.flat.zero_()
        for delta, view in zip(self.deltas, self.flat.split(self.sizes), strict=True):
            delta.statistics[self.slot] = view
        sizes = torch.tensor(self.sizes)
        ends = sizes.cumsum(0) - 1
        self.flag = ends.repeat_interleave(sizes).to(device)  # where the module of an entry says if it was used
        self.is_flag = torch.zeros(len(self.flat), dtype=torch.bool).index_fill_(0, ends, True).to(device)
        self.used = self.flat.new_ones(1)
        self.unused = self.flat.new_zeros(max(self.sizes))

    # -- one step ------------------------------------------------------------------------------------------------

    def collect(self, module: int, x: Tensor) -> None:
        """One use of a module with input x."""
        squares = self._squares(self.deltas[module].inputs, x)  # perhaps another module's: never add to it in place
        self.sums[module] = self.sums[module] + squares if module in self.sums else squares

    def _squares(self, inputs: Inputs, x: Tensor) -> Tensor:
        """Σ x_j² over tokens; query, key and value read the same tensor, which is reduced once."""
        if not isinstance(inputs, Vectors):
            return inputs.square_sums(x, self.dtype)
        if self.latest is None or not same_values(x, *self.latest[:2]):
            # x is kept: its address cannot be given away meanwhile
            self.latest = x, x._version, inputs.square_sums(x, self.dtype)
        return self.latest[2]

    def forget(self) -> None:
        """Drop the sums: the step is over, or was never taken."""
        self.sums, self.latest = {}, None

    def update(self) -> None:
        """N ← lerp(N, n, 1 − β); a collective in a process group. A step with a non-finite sum changes nothing."""
        sums = torch.cat([part for i in range(len(self.deltas)) for part in self._sums(i)])
        if in_process_group():
            dist.all_reduce(sums)
        new = torch.where(self.is_flag, sums.sign(), sums.sqrt())
        new = torch.where(sums.isfinite().all(), new, self.flat)
        used = sums.index_select(0, self.flag).clamp_(max=1)
        before = self.flat.index_select(0, self.flag)
        self.flat.lerp_(new, used * (1 - self.beta * before))

    def _sums(self, module: int) -> tuple[Tensor, ...]:
        if module not in self.sums:
            return (self.unused[: self.sizes[module]],)
        return self.sums[module].to(self.flat), self.used


def same_values(x: Tensor, other: Tensor, version: int) -> bool:
    """Is x the tensor `other`, unchanged since it had this version?"""
    return (
        x.data_ptr() == other.data_ptr()
        and (x.shape, x.stride(), x.dtype) == (other.shape, other.stride(), other.dtype)
        and x._version == version
    )
