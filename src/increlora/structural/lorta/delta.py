"""LoRTA's form: every ΔW is a slice of one order-5 tensor, stored as five factors that all modules share.

    T[i, j, h, m, l] = s · Σ_ρ A[i, ρ] B[j, ρ] C_head[h, ρ] C_matrix[m, ρ] C_layer[l, ρ]
    E = C_head ⊙ B (H·d_h, r): row h·d_h + j is C_head[h] ∘ B[j], the order of a transformer's heads
    g = s · C_matrix[m] ∘ C_layer[l]
    heads on the output: ΔW = E diag(g) Aᵀ        heads on the input: ΔW = A diag(g) Eᵀ

So a module's ΔW is a product of two thin factors, computed again at every use.
The bank owns the five factors, once per model; a delta refers to it and has no parameters of its own.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from ...callers import running
from ...deltas.base import Delta, Stored, check_known, check_shape
from ...deltas.blocks import joined
from ...errors import DriveError
from ...ops.fused_linear import Pending, add_product
from ...ops.parallel import in_process_group


class TensorBank(Stored):
    """The five factors, r columns each: A (d, r), B (d_h, r), C_head (H, r), C_matrix (4, r), C_layer (L, r).

    Args:
        initial: their initial values, in this order.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_C_head: nn.Parameter
    lora_C_matrix: nn.Parameter
    lora_C_layer: nn.Parameter
    names = ("lora_A", "lora_B", "lora_C_head", "lora_C_matrix", "lora_C_layer")

    def __init__(self, *initial: Tensor) -> None:
        super().__init__()
        for name, values in zip(self.names, initial, strict=True):
            setattr(self, name, nn.Parameter(values))

    @property
    def rank(self) -> int:
        return self.lora_A.shape[1]

    def check(self, found: Mapping[str, Tensor]) -> None:
        """A checkpoint may have another rank, the same in all five."""
        A = found.get("lora_A")
        rank = self.rank if A is None or A.dim() != 2 else A.shape[1]
        for name, (rows, _) in self.entries().items():
            check_shape(name, (rows, max(1, rank)), found)
        check_known(found, self.entries())

    def fit(self, found: Mapping[str, Tensor], *, keep_dormant: bool) -> None:
        if found["lora_A"].shape[1] != self.rank:
            for name, p in list(self.named_parameters()):
                setattr(self, name, nn.Parameter(p.new_empty(found[name].shape), requires_grad=p.requires_grad))


class TensorDelta(Delta):
    """ΔW of one linear map whose outputs are the given parts, stacked in this order; rank and factors are the bank's.

    Args:
        parts: (row m of C_matrix, heads) of each part. With fewer heads than the bank has, H, each stands for a group
            of H/heads and has the mean of their rows of C_head: what tying the weights of replicated heads amounts to.
        layer: row l of C_layer.   scale: rank → s.
        heads_out: do the heads lie on the output side, or on the input side?
    """

    def __init__(
        self, in_features: int, out_features: int, bank: TensorBank, *, parts: Sequence[tuple[int, int]], layer: int,
        scale: Callable[[int], float], heads_out: bool, name: str = "", dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, name=name, dropout=dropout)
        self.parts, self.layer, self.scale_of, self.heads_out = tuple(parts), layer, scale, heads_out
        self._bank = (bank,)  # in a tuple, so that torch does not register it here: the model has it once

    @property
    def bank(self) -> TensorBank:
        return self._bank[0]

    @property
    def rank(self) -> int:
        return self.bank.rank

    @property
    def scale(self) -> float:
        return self.scale_of(self.rank)

    @property
    def cost(self) -> int:
        return 0

    def factors(self) -> tuple[Tensor, Tensor]:
        bank, C = self.bank, self.bank.lora_C_head
        g = [self.scale * bank.lora_C_matrix[m] * bank.lora_C_layer[self.layer] for m, _ in self.parts]
        if self.heads_out:
            heads = [grouped(C, n) * g_m for (_, n), g_m in zip(self.parts, g, strict=True)]
            return bank.lora_A.t(), khatri_rao(joined(heads, 0), bank.lora_B)
        return khatri_rao(C, bank.lora_B).t(), joined([bank.lora_A * g_m for g_m in g], 0)

    def add_to(self, y: Tensor | Pending, x: Tensor) -> Tensor:
        refuse_reentrant_checkpointing()
        A, B = (factor.to(x.device) for factor in self.factors())  # a model may be spread over devices, the bank is not
        return add_product(y, self.dropout(x), A, B)


def khatri_rao(C: Tensor, B: Tensor) -> Tensor:
    """C ⊙ B, column by column: (H, r) and (n, r) → (H·n, r), row h·n + j is C[h] ∘ B[j]."""
    return (C.unsqueeze(1) * B).flatten(0, 1)


def grouped(C: Tensor, groups: int) -> Tensor:
    """The mean of the rows of each of so many groups of neighbours."""
    return C if groups == len(C) else C.unflatten(0, (groups, -1)).mean(1)


def refuse_reentrant_checkpointing() -> None:
    """Raise DriveError in a forward pass that re-entrant activation checkpointing repeats within a process group: each
    repeated segment has a backward pass of its own, and DDP takes the first one's gradient of a shared parameter for
    all of it. The call stack is read in backward passes alone."""
    if torch.compiler.is_compiling() or not (in_process_group() and torch.is_grad_enabled()):
        return
    if torch._C._current_graph_task_id() == -1:  # outside any backward pass
        return
    if running(CheckpointFunction.backward) is not None:
        raise DriveError(
            "re-entrant activation checkpointing would let the processes' shared factors drift apart: use "
            "gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
