"""Kill processes of our own at a counted file operation, or after a while. Standard library alone: it forks."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink", "ctypes.dlsym"}


def changes_a_file(event: str, args: tuple[Any, ...]) -> bool:
    """Is this audited event one that may change what is on disk?"""
    if event == "open":
        flags = args[2] if isinstance(args[2], int) else 0
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) and str(args[0]) != os.devnull
    return event in CHANGES


def kill_at(operation: int) -> None:
    """Have this process killed just before its file operation of this number, counted from 0."""
    left = operation

    def count(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        if changes_a_file(event, args):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def attempt(work: Callable[[], None], *, at: int | None = None, after: float | None = None) -> bool:
    """Do the work in a fork of this process; False if it was killed, at a file operation or after so many seconds.
    Raises RuntimeError if it failed by itself."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if at is not None:
                kill_at(at)
            work()
            code = 0
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    if after is not None:
        ends = time.monotonic() + after
        while time.monotonic() < ends and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)  # if it has ended, nobody has taken its number: it was not waited for
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise RuntimeError("the work failed, without being killed")
    return os.WIFEXITED(status)
