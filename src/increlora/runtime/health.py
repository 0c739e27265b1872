"""Non-finite steps: counted, reported, and stopped if there is nothing else."""

import warnings

from torch import Tensor

from ..errors import NonFiniteError

LIMIT = 25  # non-finite steps in a row after which a run is not going to recover


class Health:
    """Counts steps with a non-finite gradient. On the CPU every step is judged at once; on an accelerator, where
    reading the verdict would stall the queue, the count is read at events only and the step itself is not held back."""

    def __init__(self) -> None:
        self.skipped = 0
        self.in_a_row = 0
        self._unread: Tensor | None = None

    def judge(self, finite: Tensor, where: str) -> bool:
        """May the step go on?"""
        if not finite.is_cpu:
            bad = (~finite).long()
            self._unread = bad if self._unread is None else self._unread + bad
            return True
        if bool(finite):
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        if self.skipped == 1:
            warnings.warn(
                f"non-finite gradient at {where} or a module beside it: the step is left out of the scores and the "
                f"adapter is not moved (counted in `controller.health.skipped`)",
                stacklevel=2,
            )
        if self.in_a_row >= LIMIT:
            raise NonFiniteError(
                f"{LIMIT} steps in a row with non-finite gradients ({self.skipped} in this run), first seen at {where}: "
                f"lower the learning rate, or check the loss and the input data"
            )
        return False

    def read(self) -> None:
        """Fetch the count from an accelerator."""
        if self._unread is not None:
            self.skipped += int(self._unread)
            self._unread = None
