"""Pruning of ranks by the sensitivity of their entries (AdaLoRA).

    before the step   entry sensitivities |w_t · g_t|, if the rule looks then
    after the step    … |w_{t+1} · g_t| otherwise · cut due? scores → what stays → e of the rest becomes 0
    settled           e of what was dropped is set to 0 again after every step; nothing is scored any more

One call of a `torch._foreach_` function serves all tensors; only a cut waits for the device.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...decide.budget import Budget
from ...decide.schedules import CubicDecay, Run
from ...decide.scores import smooth_entries, triplet_scores
from ...deltas import BlockDelta
from ...errors import CheckpointError
from ...methods import RankPruning
from ...ops.parallel import full, mean_over_processes
from .base import Change
from .kept import KeptRanks, dtype_of


class RankPruner:
    """Keeps the most important ranks of one-block deltas with parameters A, E and B. See `RankPruning`."""

    reads_inputs = False

    def __init__(self, rule: RankPruning, budget: Budget, deltas: Mapping[str, BlockDelta]) -> None:
        self.rule, self.ranks = rule, KeptRanks(budget, deltas)
        self.names, self.deltas = list(deltas), list(deltas.values())
        self.schedule: CubicDecay | None = None
        for delta in self.deltas:
            if len(delta.statistics) != statistics_of(delta):
                delta.statistics = torch.zeros(statistics_of(delta), dtype=dtype_of(delta))

    @property
    def settled(self) -> bool:
        return self.ranks.settled

    # -- one run -------------------------------------------------------------------------------------------------

    def check(self, run: Run) -> None:
        if not self.settled:
            self.rule.schedule(run, *self.ranks.span)

    def start(self, run: Run, *, first: int) -> None:
        if not self.settled:
            self.schedule = self.rule.schedule(run, *self.ranks.span)
            self._lay_out_statistics()
        self.ranks.lay_out()

    def _lay_out_statistics(self) -> None:
        """Views of each module's flat statistics: sensitivity, then uncertainty, of A, E and B."""
        self.parameters: list[nn.Parameter] = []
        self.sensitivity: list[Tensor] = []
        self.uncertainty: list[Tensor] = []
        for name, delta in zip(self.names, self.deltas, strict=True):
            parameters = list(delta.block(0).values())
            if len(delta.statistics) != statistics_of(delta):
                raise CheckpointError(
                    f"{name}: {len(delta.statistics)} statistics were loaded, {statistics_of(delta)} are needed: the "
                    f"adapter file is damaged"
                )
            delta.statistics = delta.statistics.to(parameters[0].device, dtype_of(delta))
            parts = delta.statistics.split([p.numel() for p in parameters] * 2)
            views = [part.view(p.shape) for part, p in zip(parts, parameters * 2, strict=True)]
            self.parameters += parameters
            self.sensitivity += views[: len(parameters)]
            self.uncertainty += views[len(parameters) :]

    # -- one step ------------------------------------------------------------------------------------------------

    def collect(self, module: int, x: Tensor) -> None:
        raise NotImplementedError

    def forget(self) -> None:
        pass

    def restored(self) -> None:
        pass

    def before_step(self, step: int, optimizer: Optimizer, *, scale: float) -> None:
        if self.rule.observe == "before_step":
            self._observe(step, scale)

    @torch.no_grad()
    def after_step(self, step: int) -> Sequence[Change]:
        if self.settled:
            self.ranks.project()
            return []
        if self.rule.observe == "after_step":
            self._observe(step, 1.0)  # fused optimizers leave gradients unscaled behind
        assert self.schedule is not None
        return self._cut(step, self.schedule) if self.schedule.due(step) else []

    @torch.no_grad()
    def _observe(self, step: int, scale: float) -> None:
        """Update the averages of every tensor that has a gradient; of the others they stay as they are."""
        if self.settled or self.schedule is None or not self.schedule.observed(step):
            return
        there = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        if not there:  # a step that was judged bad
            return
        dtype = self.sensitivity[0].dtype
        gradients = [full(self.parameters[i].grad).to(dtype) for i in there]  # type: ignore[arg-type]
        if scale != 1.0:
            gradients = list(torch._foreach_div(gradients, scale))
        smooth_entries(
            [self.sensitivity[i] for i in there],
            [self.uncertainty[i] for i in there],
            [full(self.parameters[i].detach()).to(dtype) for i in there],
            gradients,
            beta=self.rule.beta,
            beta_uncertainty=self.rule.beta_uncertainty,
        )

    def _cut(self, step: int, schedule: CubicDecay) -> list[Change]:
        """Keep as many ranks as the budget pays for now, and say which modules that changed."""
        scores = self.scores()
        kept = self.rule.keep(scores, self.ranks.costs, self.ranks.budget(schedule.ranks(step)))
        changes = self.ranks.decide(kept, scores, settled=step >= schedule.last_cut)
        self.ranks.project()
        return changes

    def scores(self) -> list[list[float]]:
        """Score of every rank, module by module, the same on every process."""
        importance = torch._foreach_mul(self.sensitivity, self.uncertainty)
        triplets = [importance[i : i + 3] for i in range(0, len(importance), 3)]
        by_shape: dict[object, list[int]] = {}
        for i, (A, _, B) in enumerate(triplets):
            by_shape.setdefault((A.shape, B.shape, A.device), []).append(i)
        found: dict[int, Tensor] = {}
        for members in by_shape.values():
            A, e, B = (torch.stack(parts) for parts in zip(*(triplets[i] for i in members), strict=True))
            found |= dict(zip(members, triplet_scores(A, e, B).unbind(), strict=True))
        device = found[0].device
        flat = mean_over_processes(torch.cat([found[i].to(device) for i in range(len(self.deltas))]))
        return [part.tolist() for part in flat.cpu().split([len(d.kept) for d in self.deltas])]


def statistics_of(delta: BlockDelta) -> int:
    """How many there are: two averages of every entry."""
    return 2 * sum(p.numel() for p in delta.block(0).values())
