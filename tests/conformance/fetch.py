"""The test suite of the installed peft: from its source distribution, fetched once per version by pip."""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from platformdirs import user_cache_path


class FetchError(RuntimeError):
    """pip could not fetch the source distribution; the text is pip's."""


def suite() -> Path:
    """The unpacked source distribution of the installed peft. Raises FetchError if it cannot be had."""
    name = f"peft-{version('peft')}"
    place = user_cache_path("increlora") / "conformance" / name
    if place.exists():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        with tarfile.open(download(name.replace("-", "=="), Path(folder))) as archive:
            archive.extractall(folder, filter="data")
        Path(folder, name, "tests", "__init__.py").touch()  # it imports itself as a package, and is published as none
        shutil.move(Path(folder, name), place)
    return place


def download(requirement: str, folder: Path) -> Path:
    """pip builds an archive's metadata even where it only downloads: with the setuptools that is here, if it can, since
    fetching another takes longer than all the rest."""
    here = find_spec("setuptools") and find_spec("setuptools.command.bdist_wheel")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", requirement,
               "--dest", str(folder), *(["--no-build-isolation"] if here else [])]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise FetchError(f"{requirement}: {done.stderr.strip()[-300:]}")
    return next(folder.glob("*.tar.gz"))
