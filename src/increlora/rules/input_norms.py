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

from ..deltas import BlockDelta
from ..ops.parallel import in_process_group
from .base import dtype_of


class InputNorms:
    """Sums of squares since the last step, and N. Modules in use are counted on the device: only all processes know."""

    def __init__(self, deltas: Sequence[BlockDelta], slot: int, *, beta: float) -> None:
        self.deltas, self.slot, self.beta = deltas, slot, beta
        self.sizes = [delta.in_features + 1 for delta in deltas]
        self.dtype = dtype_of(deltas[0])  # squares of half precision overflow above 255
        self.sums: dict[int, Tensor] = {}
        self.latest: tuple[object, Tensor, Tensor] | None = None  # what tells an input apart, the input, its squares

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
        """One use of a module with input x. Query, key and value read the same tensor, which is reduced once."""
        inputs = self.deltas[module].inputs
        key = (x.data_ptr(), x.shape, x.stride(), x.dtype, x._version, inputs)
        if self.latest is None or self.latest[0] != key:
            # x stays here: its address cannot be given away meanwhile
            self.latest = key, x, inputs.square_sums(x, self.dtype)
        squares = self.latest[-1]  # perhaps another module's: never add to it in place
        self.sums[module] = self.sums[module] + squares if module in self.sums else squares

    def forget(self) -> None:
        """Drop the sums: the step is over, or was never taken."""
        self.sums, self.latest = {}, None

    def update(self) -> None:
        """N ← lerp(N, n, 1 − β); a collective in a process group. A step with a non-finite sum changes nothing."""
        unused = [(self.unused[:size],) for size in self.sizes]
        parts = [(self.sums[i].to(self.flat), self.used) if i in self.sums else unused[i] for i in range(len(unused))]
        sums = torch.cat([part for of_module in parts for part in of_module])
        if in_process_group():
            dist.all_reduce(sums)
        new = torch.where(self.is_flag, sums.sign(), sums.sqrt())
        new = torch.where(sums.isfinite().all(), new, self.flat)
        used = sums.index_select(0, self.flag).clamp_(max=1)
        before = self.flat.index_select(0, self.flag)
        self.flat.lerp_(new, used * (1 - self.beta * before))
