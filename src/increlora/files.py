"""Write files and folders atomically: temporary name, fsync, rename."""

import contextlib
import ctypes
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically: after a crash it has either its old or its new content.

    Raises FileNotFoundError, which names the folder, if the parent folder does not exist."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}; create it first")
    with whole(path) as new:
        new.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a temporary path for a file or folder; it becomes `path` only once all its content is on disk. What was
    there before stays in place until then; what processes that were killed have left of it is removed first."""
    new = _temporary(path, "new")
    _tidy(path)
    try:
        yield new
        for item in (*new.rglob("*"), new):
            _sync(item)
        if not new.is_dir() or not (path.exists() or path.is_symlink()):
            new.replace(path)
        elif not _exchange(new, path):  # only a file replaces another in one step
            _replace_in_two(new, path)
    finally:
        remove(new)  # or what was there before
    _sync(path.parent)


def _temporary(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.{kind}")


def _tidy(path: Path) -> None:
    """Remove what dead processes of this machine have left beside `path`, and bring back what they had put aside."""
    start = f".{path.name}.{platform.node()}."
    for left in sorted(path.parent.iterdir()) if path.parent.is_dir() else ():
        number, _, kind = left.name.removeprefix(start).partition(".")
        if left.name.startswith(start) and number.isdigit() and kind in ("new", "old") and not _alive(int(number)):
            if kind == "old" and not (path.exists() or path.is_symlink()):
                left.rename(path)
            remove(left)


def _alive(process: int) -> bool:
    """Does another process of this number run? One of our own number was an earlier one."""
    if process == os.getpid() or os.name != "posix":
        return process != os.getpid()
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Give two paths each other's name in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _replace_in_two(new: Path, path: Path) -> None:
    """Whoever is killed in between leaves the old one beside it, and `_tidy` brings it back."""
    old = _temporary(path, "old")
    path.rename(old)
    try:
        new.replace(path)
    except BaseException:
        old.rename(path)
        raise
    remove(old)


def remove(path: Path) -> None:
    """Delete a file, a folder with its contents, or a link (never its target). `path` need not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
