"""What happens to ranks and parameters during a run: one rule per file, its record and its runner together."""

from .base import Change, Expected, Forecast, Rule, Runner, Step, holding_of
from .entries import Entries
from .grow import Grow, Score
from .keep import Keep
from .restart import Restart
from .shrink import Shrink

__all__ = [
    "Change", "Entries", "Expected", "Forecast", "Grow", "Keep", "Restart", "Rule", "Runner", "Score", "Shrink", "Step",
    "holding_of",
]  # fmt: skip
