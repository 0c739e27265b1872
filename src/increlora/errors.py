"""Every error the library raises on purpose: one sentence with the value, the place and the remedy."""


class IncreLoraError(Exception):
    """Base of all errors of this library; the command line prints it without a traceback and exits with 2."""


class ConfigError(IncreLoraError, ValueError):
    """A setting is unknown, out of range, or incompatible with another one."""


class BudgetError(ConfigError):
    """The budget is below the ranks at the start, above the capacity, or cannot be met exactly."""


class ScheduleError(ConfigError):
    """The schedule does not fit the run: its length is unknown, or it has too few events to spend the budget."""


class DriveError(IncreLoraError, RuntimeError):
    """An adaptive adapter trains without its controller, or with an optimizer it cannot follow."""


class NonFiniteError(IncreLoraError, FloatingPointError):
    """All gradients were non-finite for many steps in a row."""


class CheckpointError(IncreLoraError, ValueError):
    """An adapter folder is damaged, not ours, or newer than this library."""


class ExportError(IncreLoraError, ValueError):
    """An adapter cannot be exported in the requested form."""


class BackboneError(IncreLoraError, RuntimeError):
    """The pretrained weights are missing, were changed, or do not load."""


class TaskError(IncreLoraError, ValueError):
    """A task is unknown or its data cannot be read."""


class RunFolderError(IncreLoraError, ValueError):
    """A run folder already exists, is unfinished, or is not one of ours."""
