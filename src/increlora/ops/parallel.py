"""Several processes: averages over them, sharded parameters (FSDP2's DTensor), and idle parameters in DDP's graph."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..callers import running

try:
    from torch.distributed.tensor import DTensor, distribute_tensor
except ImportError:  # a torch built without distributed support
    DTensor = None  # type: ignore[assignment,misc]


def in_process_group() -> bool:
    """Whether torch.distributed is initialised. If so, every parameter must take part in every backward pass: DDP
    requires it, even in a group of one process."""
    return dist.is_available() and dist.is_initialized()


def joins_unevenly() -> bool:
    """Whether the forward pass that runs is one of DDP's under `join()`, where others step on without this process once
    its data has ended."""
    frame = running(DistributedDataParallel.forward)
    config = getattr(frame.f_locals["self"], "_join_config", None) if frame is not None else None
    return config is not None and bool(config.enable and not config.throw_on_early_termination)


TOGETHER = 256  # tensors that are concatenated for one check


def is_sharded(tensor: Tensor) -> bool:
    return DTensor is not None and isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor on this process."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def full(tensor: Tensor) -> Tensor:
    """The whole tensor (a collective where it is sharded)."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def laid_out_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, sharded in the same way as `like`."""
    if not is_sharded(like):
        return tensor
    return distribute_tensor(tensor.contiguous(), like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def mean_over_processes(scores: Tensor) -> Tensor:
    """Entry-wise mean over the processes with a finite score; NaN where there is none. The same on all processes."""
    if not in_process_group():
        return scores
    finite = scores.isfinite()
    sums = torch.stack([torch.where(finite, scores, 0.0), finite.to(scores.dtype)])
    dist.all_reduce(sums)
    return torch.where(sums[1] > 0, sums[0] / sums[1].clamp(min=1), torch.nan)


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """0-dim bool: whether every entry is finite. For sharded gradients, all processes get the same answer."""
    if not tensors:
        return torch.tensor(True)
    parts = [local(t) for t in tensors]
    if all(t.is_cpu for t in parts):  # a call costs more than the few numbers it processes
        starts = range(0, len(parts), TOGETHER)
        rows = [torch.cat([t.reshape(-1) for t in parts[start : start + TOGETHER]]) for start in starts]
        finite = torch.stack([row.isfinite().all() for row in rows]).all()
    else:
        norms = torch._foreach_norm(parts)
        finite = torch.stack([n.to(norms[0].device) for n in norms]).isfinite().all()
    if in_process_group() and is_sharded(tensors[0]):
        flag = finite.to(torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        finite = flag.bool()
    return finite


class ZeroGate(torch.autograd.Function):
    """Identity that makes idle parameters part of the graph with gradient zero; the runtime clears it before a step."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *idle: Tensor) -> Tensor:
        ctx.save_for_backward(*idle)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (grad, *(torch.zeros_like(p) for p in ctx.saved_tensors))
