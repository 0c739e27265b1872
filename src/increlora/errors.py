"""Every error the library raises on purpose: one sentence with the value, the place and the remedy."""


class IncreLoraError(Exception):
    """Base of all errors of this library; the command line prints it without a traceback and exits with 2."""


class ConfigError(IncreLoraError, ValueError):
    """A setting is unknown, out of range, or does not go with another one."""


class BudgetError(ConfigError):
    """The budget lies below the start, above the capacity, or cannot be met exactly."""


class ScheduleError(ConfigError):
    """The schedule does not fit the run: no length known, or too few events to spend the budget."""


class DriveError(IncreLoraError, RuntimeError):
    """An adaptive adapter trains without its controller, or with an optimizer it cannot follow."""


class NonFiniteError(IncreLoraError, FloatingPointError):
    """Nothing but non-finite gradients for many steps in a row."""


class CheckpointError(IncreLoraError, ValueError):
    """An adapter folder is damaged, foreign, or newer than this library."""


class ExportError(IncreLoraError, ValueError):
    """An adapter cannot leave in the requested form."""


class BackboneError(IncreLoraError, RuntimeError):
    """The pretrained weights are missing, altered, or do not load."""


class TaskError(IncreLoraError, ValueError):
    """A task is unknown or its data cannot be read."""


class RunFolderError(IncreLoraError, ValueError):
    """A run folder is in the way, unfinished, or not one of ours."""
