"""Scores of all modules as one vector, and the explanation of a budget that cannot be met."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..decide.allocation import Holding, parameters_used, ranks_used
from ..decide.budget import Budget
from ..decide.scores import signed_sensitivity
from ..decide.selection import can_finish
from ..deltas import BlockDelta
from ..errors import BudgetError
from ..methods import ScoreRule
from ..ops.parallel import full
from .taps import Watcher


def module_scores(
    deltas: Sequence[BlockDelta], watchers: Sequence[Watcher], rule: ScoreRule | None, dtype: torch.dtype
) -> Tensor:
    """(modules,) scores since the last step; NaN for a module that took no part."""
    assert rule is not None
    if rule.kind == "signed":
        found = [_signed(delta) for delta in deltas]
    else:
        found = [watcher.score(delta) for delta, watcher in zip(deltas, watchers, strict=True)]
    device = next((s.device for s in found if s is not None), torch.device("cpu"))
    missing = torch.full((), torch.nan, dtype=dtype, device=device)
    return torch.stack([missing if s is None else s.to(device, dtype) for s in found])


def _signed(delta: BlockDelta) -> Tensor | None:
    pairs = [(b["B"], b["B"].grad) for b in map(delta.block, delta.live)]
    known = [(full(B.detach()), full(grad)) for B, grad in pairs if grad is not None]
    if not known:
        return None
    return signed_sensitivity(torch.cat([B for B, _ in known], 1), torch.cat([grad for _, grad in known], 1))


def check_budget(holdings: Sequence[Holding], budget: Budget) -> None:
    """Raise the BudgetError that says why this budget cannot be met from these holdings, if it cannot."""
    used, capacity = ranks_used(holdings), sum(h.rank + sum(h.free) for h in holdings)
    if budget.ranks is None:
        if can_finish(holdings, budget):
            return
        raise BudgetError(
            f"total_parameters={budget.parameters} is below the start of {parameters_used(holdings)} (`init_r` for "
            f"each of {len(holdings)} modules): raise it or target fewer modules"
        )
    if budget.ranks < used:
        raise BudgetError(
            f"the budget of {budget.ranks} ranks is below the start of {used} (`init_r` for each of {len(holdings)} "
            f"modules): raise it or target fewer modules"
        )
    if budget.ranks > capacity:
        raise BudgetError(
            f"the budget of {budget.ranks} ranks is above the capacity of {capacity} over {len(holdings)} modules: "
            f"raise `capacity` or lower the budget"
        )
    if not budget.exact or can_finish(holdings, budget):
        return
    raise BudgetError(
        f"the budget of {budget.ranks} ranks cannot be met exactly from {used} ranks in steps of "
        f"{max((s for h in holdings for s in h.free), default=0)} and 1 over {len(holdings)} modules"
        + (f" within {budget.parameters} parameters" if budget.parameters is not None else "")
        + ": set `grow_by=1`, raise `capacity`, or give the budget as `total_ranks`"
    )
