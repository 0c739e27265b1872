"""Non-finite steps: counted, reported, and stopped if there is nothing else."""

import warnings

import torch
from torch import Tensor

from ..errors import NonFiniteError

LIMIT = 25  # non-finite steps in a row after which a run is not going to recover


class Health:
    """Counts steps with a non-finite gradient. On the CPU every step is judged at once; on an accelerator, where
    reading the verdict would stall the queue, it is read at events and every `LIMIT` steps, and the step itself is not
    held back."""

    def __init__(self) -> None:
        self.skipped = 0
        self.in_a_row = 0
        self.where = ""
        self._unread: tuple[Tensor, Tensor] | None = None  # non-finite steps, and those in a row, not yet fetched
        self._waiting = 0

    def judge(self, finite: Tensor, where: str, *, at_once: bool | None = None) -> bool:
        """May the step go on? `at_once`: default for tensors on the CPU."""
        self.where = where
        if not (finite.is_cpu if at_once is None else at_once):
            count, row = self._unread or (torch.zeros_like(finite, dtype=torch.long),) * 2
            self._unread, self._waiting = (count + ~finite, (row + 1) * ~finite), self._waiting + 1
            if self._waiting >= LIMIT:
                self.read()
            return True
        if bool(finite):
            self.in_a_row = 0
            return True
        self._report(1, self.in_a_row + 1)
        return False

    def read(self) -> None:
        """Fetch the verdicts from an accelerator."""
        if self._unread is not None:
            count, row = (int(n) for n in self._unread)
            self._unread, self._waiting = (torch.zeros_like(self._unread[0]), self._unread[1]), 0
            if count:
                self._report(count, row)

    def _report(self, count: int, in_a_row: int) -> None:
        if self.skipped == 0:
            warnings.warn(
                f"non-finite gradient at {self.where} or a module beside it: the step is left out of the scores and, "
                f"on the CPU, of the training (counted in `controller.health.skipped`)",
                stacklevel=2,
            )
        self.skipped += count
        self.in_a_row = in_a_row
        if self.in_a_row >= LIMIT:
            raise NonFiniteError(
                f"{LIMIT} steps in a row with non-finite gradients ({self.skipped} in all), seen at {self.where}: "
                f"lower the learning rate, or check the loss and the input data"
            )
