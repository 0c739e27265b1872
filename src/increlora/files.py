"""Write files and folders atomically: temporary name, fsync, rename."""

import contextlib
import os
import shutil
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
    there before stays in place until then."""
    new, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    remove(new)
    try:
        yield new
        for item in (*new.rglob("*"), new):
            _sync(item)
        if new.is_dir() and (path.exists() or path.is_symlink()):  # only a file replaces another in one step
            remove(old)
            path.rename(old)
        new.replace(path)
        remove(old)
    finally:
        remove(new)
    _sync(path.parent)


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
