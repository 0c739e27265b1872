"""Who is calling: some facts are known nowhere but on the call stack."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def running(function: Callable[..., Any]) -> FrameType | None:
    """The nearest frame on the call stack that runs this function; None if none does."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return frame
